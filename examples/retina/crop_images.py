"""Crop fundus photographs to their field of view: python crop_images.py --images DIR --out DIR.

Cameras leave margins of other widths around the round field of view, and some cut it off above and below. This
finds the field, pads it to a square with black (nothing is squeezed) and reduces it, so that an eye has the same
shape and about the same size at every hospital. Files keep their names, as PNG. Every hospital uses the same
settings, and so does whoever scores images with the model later.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from fedcore.data.images import IMAGE_SUFFIXES
from fedcore.errors import DataError
from fedcore.program import run_program

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
# A field of view narrower or lower than this share of the frame is taken for a bad threshold.
SMALLEST_FIELD = 0.25
# Pixels a side at which the field is looked for; finer structure is noise to this question.
COARSE_SIDE = 256


@app.command()
def main(
    images: Annotated[Path, typer.Option(help="Folder with the photographs; folders below it count.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    size: Annotated[int, typer.Option(help="Pixels a side of the result.", min=32)] = 256,
    threshold: Annotated[
        float, typer.Option(help="Brightness that tells the field from black, as a share of white.", min=0.0)
    ] = 0.06,
) -> None:
    """Crop every image below a folder. Ends with an error, and writes the rest, if some can't be cropped."""
    if out.resolve() == images.resolve():
        raise DataError(f"--out {out} is --images", hint="the originals are never overwritten: name another")
    files = sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise DataError(f"{images}: no images found", hint=f"an image is {' '.join(sorted(IMAGE_SUFFIXES))}")
    problems = []
    for file in files:
        target = out / file.relative_to(images).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with Image.open(file) as picture:
                crop(picture.convert("RGB"), size, threshold).save(target)
        except (DataError, OSError, ValueError, Image.DecompressionBombError) as error:
            problems.append(f"{file.relative_to(images)}: {error}")
    typer.echo(f"{len(files) - len(problems)} of {len(files)} images cropped to {size} x {size} in {out}")
    if problems:
        listed = "\n  ".join(problems[:10])
        raise DataError(
            f"{len(problems)} images could not be cropped, among them:\n  {listed}",
            hint="look at them; leave them out of the table of grades, or try another --threshold",
        )


def crop(picture: Image.Image, size: int, threshold: float) -> Image.Image:
    """The field of view of an RGB photograph in a black square of `size` pixels. Raises DataError."""
    left, top, right, bottom = field_of_view(picture, threshold)
    side = max(right - left, bottom - top)
    square = Image.new("RGB", (side, side))
    corner = ((side - (right - left)) // 2, (side - (bottom - top)) // 2)
    square.paste(picture.crop((left, top, right, bottom)), corner)
    return square.resize((size, size), Image.Resampling.LANCZOS)


def field_of_view(picture: Image.Image, threshold: float) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is brighter than `threshold` of white, in pixels.

    A row or column belongs to it if a twentieth of its pixels are: text and dust in the margin are less.
    Raises DataError if there is nothing, or hardly anything.
    """
    width, height = picture.size
    coarse = picture.resize((COARSE_SIDE, COARSE_SIDE), Image.Resampling.BOX)
    bright = np.asarray(coarse).max(axis=2) > 255 * threshold
    (left, right), (top, bottom) = _extent(bright.mean(axis=0)), _extent(bright.mean(axis=1))
    if min(right - left, bottom - top) < SMALLEST_FIELD * COARSE_SIDE:
        raise DataError(f"no field of view found brighter than {threshold:g} of white")
    across, down = width / COARSE_SIDE, height / COARSE_SIDE
    return int(left * across), int(top * down), round(right * across), round(bottom * down)


def _extent(share: NDArray[np.floating]) -> tuple[int, int]:
    """First and one past the last place where at least a twentieth is bright; (0, 0) if nowhere."""
    places = np.flatnonzero(share >= 0.05)
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


if __name__ == "__main__":
    run_program(app)
