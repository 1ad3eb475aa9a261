"""Impressions on one sheet to look at: a row a class, each picture enlarged so that its pixels stay what they are.

A PNG, or an HTML page where the file's name ends so. The file is readable by its owner only: impressions are sensitive.
"""

import importlib.util
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedcore.errors import ConfigError, StorageError
from fedcore.private_files import write_file
from fedcore.report.pictures import Pictures, picture_rows
from fedcore.report.style import CSS

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# Pixels. Small pictures are enlarged by a whole number to about _PICTURE; large ones stand as they are.
_PICTURE, _SHEET, _LABEL, _MARGIN, _GAP, _ROW_GAP = 84, 1340, 184, 36, 6, 22
_NAME_LINES, _NAME_HEIGHT = 2, 62
_BACKGROUND, _INK, _SOFT, _RULE = (250, 250, 248), (24, 27, 31), (108, 116, 126), (224, 226, 229)
SUFFIXES = (".png", ".html")
FOOTNOTE = "Impressions are optimised through the federation's model; they are no photographs. Handle them as sensitive."


@dataclass(frozen=True, slots=True)
class Caption:
    """What stands above the pictures: a title and a line of facts."""

    title: str
    facts: str


def check_sheet_path(out: Path) -> None:
    """Raise ConfigError unless a sheet can have this name."""
    if out.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"--out {out}: a sheet is a picture or a page", hint="end its name in .png or .html"
        )


def write_sheet(
    out: Path, pictures: Pictures, class_names: Sequence[str], caption: Caption, *, per_class: int = 24
) -> None:
    """Write a sheet with at most `per_class` pictures of each class; a class without a name goes by its number.

    Raises ConfigError for another suffix than SUFFIXES, StorageError if it can't be written.
    """
    check_sheet_path(out)
    if out.suffix.lower() == ".html":
        data = html_sheet(pictures, class_names, caption, per_class).encode()
    else:
        buffer = io.BytesIO()
        png_sheet(pictures, class_names, caption, per_class).save(buffer, "PNG", optimize=True)
        data = buffer.getvalue()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_file(out, data)
    except OSError as error:
        raise StorageError(f"{out}: can't be written: {error}") from error


def html_sheet(pictures: Pictures, class_names: Sequence[str], caption: Caption, per_class: int) -> str:
    """A page that stands alone, pictures included."""
    title = escape(caption.title)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style></head><body><main><h1>{title}</h1>"
        f'<p class="soft">{escape(caption.facts)}</p><section class="card">'
        f'{picture_rows(pictures, tuple(class_names), per_class)}</section><p class="soft">{FOOTNOTE}</p>'
        "</main></body></html>\n"
    )


def png_sheet(
    pictures: Pictures, class_names: Sequence[str], caption: Caption, per_class: int
) -> "Image.Image":
    """The sheet as a picture, its height as the rows take it."""
    from PIL import Image, ImageDraw

    side = pictures.images.shape[3] * _factor(pictures)
    tall = pictures.images.shape[2] * _factor(pictures)
    columns = max(1, (_SHEET - 2 * _MARGIN - _LABEL + _GAP) // (side + _GAP))
    rows = list(_rows(pictures, class_names, per_class))
    heights = [max(_NAME_HEIGHT, -(-len(row.chosen) // columns) * (tall + _GAP) - _GAP) for row in rows]
    top = _MARGIN + 84
    width = max(_SHEET, 2 * _MARGIN + _LABEL + side)
    sheet = Image.new("RGB", (width, top + sum(heights) + _ROW_GAP * len(rows) + 50), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    _text(draw, (_MARGIN, _MARGIN - 6), caption.title, 27, _INK, width - 2 * _MARGIN, bold=True)
    _text(draw, (_MARGIN, _MARGIN + 34), caption.facts, 15, _SOFT, width - 2 * _MARGIN)
    y = top
    for row, height in zip(rows, heights, strict=True):
        draw.line((_MARGIN, y - _ROW_GAP // 2, width - _MARGIN, y - _ROW_GAP // 2), _RULE)
        lines = _lines(draw, row.name)
        for number, line_of_name in enumerate(lines):
            _text(draw, (_MARGIN, y + 20 * number), line_of_name, 16, _INK, _LABEL - 18, bold=True)
        _text(draw, (_MARGIN, y + 20 * len(lines) + 4), row.count, 13, _SOFT, _LABEL - 18)
        for place, index in enumerate(row.chosen):
            line, column = divmod(place, columns)
            at = (_MARGIN + _LABEL + column * (side + _GAP), y + line * (tall + _GAP))
            sheet.paste(_enlarged(pictures, index), at)
        y += height + _ROW_GAP
    draw.line((_MARGIN, y - _ROW_GAP // 2, width - _MARGIN, y - _ROW_GAP // 2), _RULE)
    _text(draw, (_MARGIN, y + 4), FOOTNOTE, 13, _SOFT, width - 2 * _MARGIN)
    return sheet


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    count: str
    chosen: list[int]


def _rows(pictures: Pictures, class_names: Sequence[str], per_class: int) -> Iterator[_Row]:
    for label in sorted({int(label) for label in pictures.labels}):
        name = class_names[label] if 0 <= label < len(class_names) else f"class {label}"
        found = np.flatnonzero(pictures.labels == label).tolist()
        shown = f"{min(per_class, len(found))} of {len(found)}" if len(found) > per_class else str(len(found))
        yield _Row(name, f"{shown} impression{'s' if len(found) != 1 else ''}", found[:per_class])


def _factor(pictures: Pictures) -> int:
    longest: int = max(pictures.images.shape[2:])
    return max(1, round(_PICTURE / max(1, longest)))


def _enlarged(pictures: Pictures, index: int) -> "Image.Image":
    """One picture, each of its pixels a square: 3 channels as colours, of any other number the first in grey."""
    from PIL import Image

    image, factor = pictures.images[index], _factor(pictures)
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0) if len(image) == 3 else image[0])
    picture = Image.fromarray(pixels).convert("RGB")
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _lines(draw: "ImageDraw.ImageDraw", name: str) -> list[str]:
    """A class's name in at most _NAME_LINES lines; the last may be too long still."""
    words = name.split() or [name]
    lines = [words[0]]
    for word in words[1:]:
        longer = f"{lines[-1]} {word}"
        fits = draw.textlength(longer, _font(16, True)) <= _LABEL - 18
        if fits or len(lines) == _NAME_LINES:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _text(
    draw: "ImageDraw.ImageDraw",
    at: tuple[int, int],
    text: str,
    size: int,
    ink: tuple[int, int, int],
    width: int,
    *,
    bold: bool = False,
) -> None:
    """One line of text, cut with an ellipsis where it would be wider than `width`."""
    font, shown = _font(size, bold), text
    while shown and draw.textlength(shown, font) > width:
        shown = f"{shown.rstrip('…')[:-1].rstrip()}…" if len(shown) > 1 else ""
    draw.text(at, shown, ink, font)


@cache
def _font(size: int, bold: bool) -> "Font":
    """DejaVu Sans, which matplotlib brings (found without importing it): it knows Greek and Cyrillic class names too."""
    from PIL import ImageFont

    spec = importlib.util.find_spec("matplotlib")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder) / "mpl-data" / "fonts" / "ttf" / f"DejaVuSans{'-Bold' if bold else ''}.ttf"
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default(size)
