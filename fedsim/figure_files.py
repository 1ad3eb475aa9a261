"""What all pictures share: figures without a display, colours, file names, SVG and PNG that are the same each time."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcore.errors import StorageError
from fedsim.statistics import Setting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REFERENCES = ("pooled", "single_site")
_DPI = 130


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture in two files, `title` for people."""

    title: str
    svg: Path
    png: Path


def new_figure(width_in: float, height_in: float) -> "Figure":
    """An empty figure of this size in inches, drawn by Agg."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", out: Path, stem: str, title: str) -> Picture:
    """Write `STEM.svg` and `STEM.png`; the same figures give the same bytes. Raises StorageError."""
    import matplotlib as mpl

    picture = Picture(title, out / f"{stem}.svg", out / f"{stem}.png")
    for path in (picture.svg, picture.png):
        # No date, no random element ids.
        metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
        try:
            with mpl.rc_context({"svg.hashsalt": "fedsim"}):
                figure.savefig(path, dpi=_DPI, metadata=metadata)
        except OSError as error:
            raise StorageError(f"{path}: can't be written: {error}") from error
    return picture


def stem_of(kind: str, setting: Setting, *more: str) -> str:
    """A short file name without its ending: "sites-digits-a0.1-8s-cnn-small"."""
    # A data set may be a path: its last part will do.
    text = " ".join([setting.title.rsplit("/", 1)[-1], *more])
    for long, short in (("alpha ", "a"), (" sites", "s"), (" profile", ""), ("feature_shift:", "shift")):
        text = text.replace(long, short)
    return f"{kind}-{re.sub(r'[^a-z0-9.]+', '-', text.lower()).strip('-')}"


def colour(index: int, count: int) -> Any:
    """The colour of one of `count` things: ten that are easy to tell apart, twenty where more are needed."""
    from matplotlib import colormaps

    return colormaps["tab10"](index % 10) if count <= 10 else colormaps["tab20"](index % 20)


def plain(text: str) -> str:
    """A text that matplotlib does not take for mathematics."""
    return text.replace("$", r"\$")


def spread_of(values: Sequence[float | None]) -> tuple[float, float, float] | None:
    """Mean, lowest and highest of what is there; None if nothing is."""
    known = [value for value in values if value is not None]
    return (sum(known) / len(known), min(known), max(known)) if known else None
