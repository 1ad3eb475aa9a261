"""Bars of the picked round, by site and by class, and what local training makes sites forget.

Means over seeds; whiskers go from the lowest to the highest seed. A figure that a run's line lacks (lines of older
versions have none by site and class) is left out; without any there is no picture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcore.data.partition_scheme import BY_SITE
from fedsim.figure_files import Picture, colour, new_figure, plain, save, spread_of, stem_of
from fedsim.plots import Point, draw_curve, finish_rounds
from fedsim.statistics import Group, Setting

# With more sites than this, the worst ones are shown.
MOST_SITES = 24
Line = Mapping[str, Any]
Spread = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Bars:
    """Figures by tick and group: `values[group][tick]` is (mean, lowest, highest) over seeds, None where unknown."""

    title: str
    ticks: tuple[str, ...]
    values: tuple[tuple[Spread | None, ...], ...]


def write_bars(setting: Setting, out: Path) -> list[Picture]:
    """Write `sites-`, `classes-` and `forgetting-SETTING` as SVG and PNG, those that there are figures for.

    Raises StorageError.
    """
    pictures = []
    for kind, bars in (("sites", site_bars(setting.groups)), ("classes", class_bars(setting.groups))):
        if bars is not None:
            pictures.append(_write(bars, setting, out, kind))
    forgotten = _write_forgetting(setting, out)
    return [*pictures, forgotten] if forgotten is not None else pictures


def site_bars(groups: Sequence[Group]) -> Bars | None:
    """Accuracy of each site. Sites that every seed deals anew are ranked, since site-1 is another one each time."""
    found = [[_picked(line, "sites") for line in group.lines] for group in groups]
    names = _names(found)
    if not names:
        return None
    shown = min(len(names), MOST_SITES)
    of_all = f", the {shown} worst of {len(names)}" if shown < len(names) else ""
    if _same_sites([line for group in groups for line in group.lines]):
        if of_all:
            names = sorted(names, key=lambda name: _lowest(found, name))[:shown]
        values = tuple(tuple(spread_of([by.get(n) for by in lines]) for n in names) for lines in found)
        return Bars(f"Accuracy by site, picked round{of_all}", tuple(names), values)
    ranked = [[sorted(by.values()) for by in lines] for lines in found]
    values = tuple(
        tuple(spread_of([by[n] for by in lines if n < len(by)]) for n in range(shown)) for lines in ranked
    )
    ticks = ["worst", *(str(n + 1) for n in range(1, shown))]
    if shown == len(names) > 1:
        ticks[-1] = "best"
    return Bars(f"Accuracy of each seed's sites in order, picked round{of_all}", tuple(ticks), values)


def class_bars(groups: Sequence[Group]) -> Bars | None:
    """Pooled recall of each class."""
    found = [[_picked(line, "classes") for line in group.lines] for group in groups]
    names = _names(found)
    if not names:
        return None
    values = tuple(tuple(spread_of([by.get(name) for by in lines]) for name in names) for lines in found)
    return Bars("Recall by class, picked round", tuple(names), values)


def forgetting_bars(groups: Sequence[Group]) -> Bars | None:
    """Mean forgetting of each strategy that was measured, one tick a strategy."""
    found = [(group.label, spread_of([row["forgetting"] for row in group.rows])) for group in groups]
    known = [(label, value) for label, value in found if value is not None]
    if not known:
        return None
    return Bars("Forgetting by strategy", tuple(label for label, _ in known), (tuple(v for _, v in known),))


def forgetting_curve(group: Group) -> list[Point]:
    """Round, mean, lowest and highest forgetting over seeds, of the rounds in which it was measured."""
    by_line = [line.get("forgetting") or {} for line in group.lines]
    rounds = sorted({int(number) for by in by_line for number in by})
    known = [(number, spread_of([by.get(str(number)) for by in by_line])) for number in rounds]
    return [(number, *value) for number, value in known if value is not None]


def _picked(line: Line, key: str) -> Mapping[str, float]:
    found: Mapping[str, float] = (line.get("picked") or {}).get(key) or {}
    return found


def _names(found: Sequence[Sequence[Mapping[str, float]]]) -> list[str]:
    return list(dict.fromkeys(name for lines in found for by in lines for name in by))


def _lowest(found: Sequence[Sequence[Mapping[str, float]]], name: str) -> float:
    return min(by[name] for lines in found for by in lines if name in by)


def _same_sites(lines: Sequence[Line]) -> bool:
    """Whether a site's name means the same site in every run: real sites, one saved split, or one seed."""
    known = [line for line in lines if _picked(line, "sites")]
    real = all(str(line.get("partition", "")).partition("+")[0] == BY_SITE for line in known)
    saved = all(line["spec"]["data"].get("partition_file") for line in known)
    return real or saved or len({line["row"]["seed"] for line in known}) == 1


def _write(bars: Bars, setting: Setting, out: Path, kind: str) -> Picture:
    bars_in = 0.11 * len(bars.ticks) * len(setting.groups)
    figure = new_figure(min(24.0, max(6.0, 2.5 + bars_in + 0.2 * len(bars.ticks))), 4.4)
    axes = figure.subplots()
    width = 0.84 / len(setting.groups)
    for index, (group, values) in enumerate(zip(setting.groups, bars.values, strict=True)):
        offset = (index - (len(setting.groups) - 1) / 2) * width
        shade = colour(index, len(setting.groups))
        _draw(axes, values, offset, width, shade, plain(group.label), len(group.lines) > 1)
    axes.set_xticks(range(len(bars.ticks)), [plain(tick) for tick in bars.ticks], **_turned(bars.ticks))
    axes.set(ylim=(0, 1), ylabel="accuracy" if kind == "sites" else "recall")
    axes.set_title(bars.title, fontsize="medium")
    figure.suptitle(plain(setting.title))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(figure, out, stem_of(kind, setting), bars.title)


def _write_forgetting(setting: Setting, out: Path) -> Picture | None:
    bars = forgetting_bars(setting.groups)
    if bars is None:
        return None
    curves = [forgetting_curve(group) for group in setting.groups]
    over_rounds = any(len(points) > 1 for points in curves)
    figure = new_figure(max(5.0, 1.5 + 0.5 * len(bars.ticks)) + (5.0 if over_rounds else 0.0), 4.2)
    panels = figure.subplots(1, 2 if over_rounds else 1, squeeze=False)[0]
    shades = {group.label: colour(n, len(setting.groups)) for n, group in enumerate(setting.groups)}
    for n, (label, value) in enumerate(zip(bars.ticks, bars.values[0], strict=True)):
        several = any(group.label == label and len(group.lines) > 1 for group in setting.groups)
        _draw(panels[0], (value,), n, 0.7, shades[label], None, several)
    panels[0].set_xticks(range(len(bars.ticks)), [plain(tick) for tick in bars.ticks], **_turned(bars.ticks))
    panels[0].set(title="mean of the last rounds", ylabel="drop in recall of rare classes")
    panels[0].axhline(0, color="black", linewidth=0.8)
    panels[0].grid(axis="y", alpha=0.3)
    if over_rounds:
        for group, points in zip(setting.groups, curves, strict=True):
            draw_curve(panels[1], group, points, shades[group.label])
        panels[1].set(title="round by round", xlabel="round")
        finish_rounds(panels[1])
        panels[1].legend(fontsize="small")
    figure.suptitle(plain(setting.title))
    return save(
        figure, out, stem_of("forgetting", setting), "Forgetting during local training (less is better)"
    )


def _draw(
    axes: Any,
    values: Sequence[Spread | None],
    offset: float,
    width: float,
    shade: Any,
    label: str | None,
    whiskers: bool,
) -> None:
    """One group's bars, each at its tick plus `offset`; whiskers where there are several seeds."""
    known = [(n + offset, *value) for n, value in enumerate(values) if value is not None]
    if not known:
        return
    places, means, lowest, highest = zip(*known, strict=True)
    errors = None
    if whiskers:
        errors = [
            [mean - low for mean, low in zip(means, lowest, strict=True)],
            [high - mean for mean, high in zip(means, highest, strict=True)],
        ]
    axes.bar(
        places,
        means,
        width,
        yerr=errors,
        color=shade,
        label=label,
        error_kw={"linewidth": 0.8, "capsize": 1.5},
    )


def _turned(ticks: Sequence[str]) -> dict[str, Any]:
    """Tick labels that would run into one another are turned."""
    long = max(map(len, ticks)) * len(ticks) > 60 or max(map(len, ticks)) > 12
    return {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if long else {}
