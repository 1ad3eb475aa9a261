# ruff: noqa: N803 - shape suffixes
"""Pictures of impressions: grids of classes over rounds, and where they lie among real images. No torch.

One of each for every strategy, of the first run whose folder still holds what it takes. Legend: M impressions,
C channels, H x W pixels.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import StorageError
from fedcore.report.pictures import Pictures, read_pictures
from fedsim.figure_files import Picture, colour, new_figure, plain, save, stem_of
from fedsim.projection import PROJECTION_FILE
from fedsim.statistics import Group, Setting

# Impressions shown at most of a class and round; white pixels between pictures and between cells.
SHOWN, GAP_PX, CELL_GAP_PX = 3, 1, 4
_WHITE = 255
_PICTURE_IN = 0.5
_PROJECTED = ("round", "class_names", "explained", "real", "impressions")


def write_impressions(setting: Setting, out: Path) -> list[Picture]:
    """Write `impressions-` and `features-SETTING-STRATEGY` as SVG and PNG, where a run kept them.

    Raises StorageError if a file is damaged or can't be written.
    """
    pictures = []
    for group in setting.groups:
        for line, folder in _folders(group, out):
            banks = [read_pictures(path, _round_of(path)) for path in _banks(folder)]
            if banks:
                names = _class_names(folder)
                pictures.append(_write_grid(banks, names, setting, group, line, out))
                break
        for line, folder in _folders(group, out):
            if (folder / PROJECTION_FILE).is_file():
                pictures.append(
                    _write_projection(_read(folder / PROJECTION_FILE, *_PROJECTED), setting, group, line, out)
                )
                break
    return pictures


@dataclass(frozen=True, slots=True)
class Grid:
    """Impressions as one picture: `pixels` uint8 [H, W, 3]; the centres of rows and of columns in pixels."""

    pixels: NDArray[np.uint8]
    rows: tuple[float, ...]
    columns: tuple[float, ...]
    # Pictures side by side in a cell.
    across: int


def grid(banks: Sequence[Pictures], classes: Sequence[int]) -> Grid:
    """A row a class and a column a bank, the first impressions of each, at most SHOWN, in a cell."""
    _, _, height, width = banks[0].images.shape
    chosen = {
        (k, n): np.flatnonzero(bank.labels == k)[:SHOWN] for k in classes for n, bank in enumerate(banks)
    }
    across = max(1, *map(len, chosen.values()))
    cell_width = across * width + (across - 1) * GAP_PX
    down, right = height + CELL_GAP_PX, cell_width + CELL_GAP_PX
    shape = (len(classes) * down - CELL_GAP_PX, len(banks) * right - CELL_GAP_PX, 3)
    pixels = np.full(shape, _WHITE, np.uint8)
    for row, label in enumerate(classes):
        for column, bank in enumerate(banks):
            for place, index in enumerate(chosen[label, column]):
                top, left = row * down, column * right + place * (width + GAP_PX)
                pixels[top : top + height, left : left + width] = _colours(bank.images[index])
    return Grid(
        pixels,
        tuple(row * down + (height - 1) / 2 for row in range(len(classes))),
        tuple(column * right + (cell_width - 1) / 2 for column in range(len(banks))),
        across,
    )


def _colours(image_CHW: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image [H, W, 3]: three channels as they are, of any other number the first in grey."""
    return np.moveaxis(image_CHW if len(image_CHW) == 3 else np.repeat(image_CHW[:1], 3, axis=0), 0, -1)


def _write_grid(
    banks: Sequence[Pictures],
    names: Sequence[str],
    setting: Setting,
    group: Group,
    line: Mapping[str, Any],
    out: Path,
) -> Picture:
    classes = sorted({int(label) for bank in banks for label in bank.labels})
    made = grid(banks, classes)
    width_in = max(3.5, 1.4 + _PICTURE_IN * made.across * len(banks))
    figure = new_figure(width_in, 1.2 + _PICTURE_IN * len(classes))
    axes = figure.subplots()
    axes.imshow(made.pixels, interpolation="nearest")
    axes.set_xticks(made.columns, [f"round {bank.round}" for bank in banks])
    axes.set_yticks(made.rows, [plain(names[k]) if k < len(names) else str(k) for k in classes])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    title = f"Impressions of {group.label}, seed {line['row']['seed']}"
    axes.set_title(plain(title), fontsize="medium")
    return save(figure, out, stem_of("impressions", setting, group.label), title)


def _write_projection(
    found: Mapping[str, Any], setting: Setting, group: Group, line: Mapping[str, Any], out: Path
) -> Picture:
    from matplotlib.lines import Line2D

    names: list[str] = found["class_names"]
    figure = new_figure(8.0, 5.6)
    axes = figure.subplots()
    # Real images below, small and pale; impressions above, outlined.
    styles: dict[str, dict[str, Any]] = {
        "real": {"marker": "o", "s": 16, "alpha": 0.45, "linewidths": 0},
        "impressions": {"marker": "^", "s": 42, "edgecolors": "black", "linewidths": 0.6},
    }
    shades = [colour(k, len(names)) for k in range(len(names))]
    for kind, style in styles.items():
        points, labels = np.array(found[kind]["points"]).reshape(-1, 2), found[kind]["labels"]
        axes.scatter(points[:, 0], points[:, 1], c=[shades[k] for k in labels], **style)
    first, second = (f"{share:.0%}" for share in found["explained"])
    axes.set(xlabel=f"first component ({first} of the variance)", ylabel=f"second component ({second})")
    title = f"Features of {group.label}, seed {line['row']['seed']}: real images and impressions of round {found['round']}"
    axes.set_title(plain(title), fontsize="medium")
    axes.grid(alpha=0.3)
    handles = [
        Line2D([], [], marker="s", linestyle="", color=shades[k], label=plain(names[k]))
        for k in sorted({*found["real"]["labels"], *found["impressions"]["labels"]})
    ]
    handles += [
        Line2D([], [], marker="o", linestyle="", color="grey", alpha=0.6, label="real test image"),
        Line2D([], [], marker="^", linestyle="", color="grey", markeredgecolor="black", label="impression"),
    ]
    axes.legend(handles=handles, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(figure, out, stem_of("features", setting, group.label), title)


def _folders(group: Group, out: Path) -> Iterator[tuple[Mapping[str, Any], Path]]:
    """The group's runs and their folders, those that are there."""
    for line in group.lines:
        folder = out / str(line.get("folder", ""))
        if line.get("folder") and folder.is_dir():
            yield line, folder


def _banks(folder: Path) -> list[Path]:
    return sorted((folder / "impressions").glob("round-*.safetensors"))


def _round_of(path: Path) -> int:
    return int(path.stem.removeprefix("round-"))


def _class_names(folder: Path) -> list[str]:
    plan = _read(folder / "plan.json")
    return list(plan.get("data", {}).get("class_names") or [])


def _read(path: Path, *keys: str) -> dict[str, Any]:
    hint = "delete the run's folder: it is then left out of the pictures"
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: can't be read: {error}", hint=hint) from error
    lacking = [key for key in keys if key not in document]
    if lacking:
        raise StorageError(f"{path}: damaged, '{lacking[0]}' is missing", hint=hint)
    return document
