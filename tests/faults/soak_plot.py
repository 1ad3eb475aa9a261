"""The soak as a picture: what each process holds over time and the lines fitted to it; disk and round time beside it."""

from pathlib import Path
from typing import Any

from fedsim.figure_files import Picture, colour, new_figure, save

_TITLES = {"rss_mb": "memory, MB (RSS)", "descriptors": "open descriptors", "threads": "threads"}


def plot(found: dict[str, Any], out: Path) -> Picture:
    """Write soak.svg and soak.png of what soak.json holds."""
    figure = new_figure(13, 10.5)
    axes = figure.subplots(3, 2)
    colours = {
        role: colour(n, 8) for n, role in enumerate(dict.fromkeys(one["role"] for one in _lives(found)))
    }
    for axis, (measure, title) in zip(axes.flat, _TITLES.items(), strict=False):
        _held(axis, found, measure, colours)
        axis.set_title(title)
    _rounds(axes[1, 1], found)
    _disk(axes[2, 0], found, colours)
    _legend(axes[2, 1], found, colours)
    for axis in list(axes.flat)[:5]:
        axis.set_xlabel("minutes")
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
    said = "flat" if found["flat"] else "not flat"
    figure.suptitle(
        f"{found['minutes']:g} minutes, {found['runs']} runs, {found['rounds']} rounds,"
        f" {sum(found['faults'].values())} faults: {said}"
    )
    return save(figure, out, "soak", "soak")


def _lives(found: dict[str, Any]) -> list[dict[str, Any]]:
    lives: list[dict[str, Any]] = found["series"]["lives"]
    return lives


def _held(axis: Any, found: dict[str, Any], measure: str, colours: dict[str, Any]) -> None:
    for life in _lives(found):
        minutes = [second / 60 for second in life["times_s"]]
        axis.plot(minutes, life[measure], color=colours[life["role"]], linewidth=0.9, alpha=0.75)
        for row in found["growth"]:
            if (row["pid"], row["measure"]) == (life["pid"], measure):
                end_s = life["times_s"][-1]
                begin_s = end_s - row["seconds"]
                half = row["total"] / 2
                ends = [row["mean"] - half, row["mean"] + half]
                axis.plot([begin_s / 60, end_s / 60], ends, color="black", linewidth=1.3, linestyle="--")


def _rounds(axis: Any, found: dict[str, Any]) -> None:
    rounds = found["series"]["rounds"]
    axis.plot([at / 60 for at, _ in rounds], [taken for _, taken in rounds], ".", markersize=3, color="grey")
    axis.set_title("a round, s, at the minute in which its run began")


def _disk(axis: Any, found: dict[str, Any], colours: dict[str, Any]) -> None:
    samples = found["series"]["disk"]
    for home in dict.fromkeys(key for sample in samples for key in sample if key != "seconds"):
        held = [(sample["seconds"] / 60, sample[home]) for sample in samples if home in sample]
        axis.plot(*zip(*held, strict=True), color=colours.get(home), linewidth=0.9)
    axis.set_title("home on the disk, MB (grows with the journal and the models kept)")


def _legend(axis: Any, found: dict[str, Any], colours: dict[str, Any]) -> None:
    axis.axis("off")
    for role, shade in colours.items():
        axis.plot([], [], color=shade, label=role)
    axis.plot([], [], color="black", linestyle="--", label="least squares, after the warm-up")
    axis.legend(loc="upper left", frameon=False, fontsize=8)
    lines = [
        f"{row['process']}: {row['slope_per_hour']:+.1f} ± {row['within_per_hour']:.1f} {unit} an hour"
        for measure, unit in (("rss_mb", "MB"), ("descriptors", "descriptors"))
        for row in found["growth"]
        if row["measure"] == measure
    ]
    axis.text(0.45, 0.98, "\n".join(lines), transform=axis.transAxes, va="top", fontsize=8)
