"""Curves with their spread over seeds, as SVG and PNG, by matplotlib without a display."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedcore.errors import StorageError
from fedsim.statistics import Group, Setting

CURVES = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "worst_site_accuracy": "worst site",
}


def write_curves(settings: Sequence[Setting], out: Path) -> list[Path]:
    """Write `curves-SETTING.svg` and `.png` for each setting: mean over seeds, lowest to highest shaded.

    Raises StorageError.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    for setting in settings:
        figure = Figure(figsize=(5.2 * len(CURVES), 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (name, title) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
            for index, group in enumerate(setting.groups):
                _draw(axes, group, name, f"C{index % 10}")
            axes.set(title=title, xlabel="round", ylim=(0, 1))
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
        figure.axes[0].legend(fontsize="small")
        figure.suptitle(setting.title)
        stem = f"curves-{re.sub(r'[^a-z0-9.]+', '-', setting.title.lower()).strip('-')}"
        for suffix in ("svg", "png"):
            path = out / f"{stem}.{suffix}"
            try:
                # The same figures give the same bytes: no date, no random element ids.
                with mpl.rc_context({"svg.hashsalt": "fedsim"}):
                    metadata: dict[str, Any] = {"Date": None} if suffix == "svg" else {}
                    figure.savefig(path, dpi=130, metadata=metadata)
            except OSError as error:
                raise StorageError(f"{path}: can't be written: {error}") from error
            written.append(path)
    return written


def spread(group: Group, name: str) -> list[tuple[int, float, float, float]]:
    """Round, mean, lowest and highest over seeds, where a run has a figure."""
    curves = [line["curves"][name] for line in group.lines]
    found = []
    for index in range(max((len(curve) for curve in curves), default=0)):
        known = [curve[index] for curve in curves if index < len(curve) and curve[index] is not None]
        if known:
            found.append((index + 1, sum(known) / len(known), min(known), max(known)))
    return found


def _draw(axes: Any, group: Group, name: str, colour: str) -> None:
    points = spread(group, name)
    if not points:
        return
    rounds, means, lowest, highest = zip(*points, strict=True)
    dashes = "--" if group.strategy in ("pooled", "single_site") else "-"
    axes.plot(rounds, means, dashes, color=colour, label=group.label)
    if len(group.lines) > 1:
        axes.fill_between(rounds, lowest, highest, color=colour, alpha=0.15, linewidth=0)
