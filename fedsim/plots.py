"""Curves with their spread over seeds, as SVG and PNG, by matplotlib without a display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsim.figure_files import REFERENCES, colour, new_figure, plain, save, spread_of, stem_of
from fedsim.statistics import Group, Setting

CURVES = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "worst_site_accuracy": "worst site",
}
Point = tuple[int, float, float, float]


def write_curves(settings: Sequence[Setting], out: Path) -> list[Path]:
    """Write `curves-SETTING.svg` and `.png` for each setting: mean over seeds, lowest to highest shaded.

    Raises StorageError.
    """
    written = []
    for setting in settings:
        figure = new_figure(5.2 * len(CURVES), 4.2)
        for axes, (name, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
            for index, group in enumerate(setting.groups):
                draw_curve(axes, group, spread(group, name), colour(index, len(setting.groups)))
            axes.set(title=title, xlabel="round", ylim=(0, 1))
            finish_rounds(axes)
        figure.axes[0].legend(fontsize="small")
        figure.suptitle(plain(setting.title))
        picture = save(figure, out, stem_of("curves", setting), "Curves")
        written += [picture.svg, picture.png]
    return written


def spread(group: Group, name: str) -> list[Point]:
    """Round, mean, lowest and highest over seeds, where a run has a figure."""
    curves = [line["curves"][name] for line in group.lines]
    found = []
    for index in range(max((len(curve) for curve in curves), default=0)):
        known = spread_of([curve[index] for curve in curves if index < len(curve)])
        if known is not None:
            found.append((index + 1, *known))
    return found


def draw_curve(axes: Any, group: Group, points: Sequence[Point], shade: Any) -> None:
    """Draw a group's mean and, over several seeds, its spread; nothing without points."""
    if not points:
        return
    rounds, means, lowest, highest = zip(*points, strict=True)
    dashes = "--" if group.strategy in REFERENCES else "-"
    axes.plot(rounds, means, dashes, color=shade, label=plain(group.label))
    if len(group.lines) > 1:
        axes.fill_between(rounds, lowest, highest, color=shade, alpha=0.15, linewidth=0)


def finish_rounds(axes: Any) -> None:
    """Whole rounds below, a faint grid behind."""
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
