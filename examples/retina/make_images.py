"""Draw retina-like images for trying the example out: python make_images.py --out DIR.

    OUT/HOSPITAL/images/p007_left.png        and      OUT/HOSPITAL/grades.csv (image, patient, grade)

Four hospitals, each with its own camera (colour, sharpness, frame) and its own patients (one has no severe eyes,
one no healthy ones). They are drawings: they show that the commands work and that hospitals differ, nothing about
medicine. The same arguments give the same images.

Legend: R radius of the field of view in pixels, H x W pixels of a frame.
"""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from fedcore.data.splits import apportion
from fedcore.errors import ConfigError
from fedcore.program import run_program
from fedcore.seeding import derive_seed

Picture = NDArray[np.float64]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
NUMBERS = ("0", "1", "2", "3", "4")
# Small red dots, bleedings, yellow deposits and pale clouds of an eye, by grade.
SIGNS = ((0, 0, 0, 0), (6, 0, 0, 0), (10, 4, 5, 0), (18, 14, 5, 4), (10, 6, 4, 2))
# Where the optic disc and the macula lie in a right eye, in radii from the centre.
DISC, MACULA, DISC_RADIUS = (0.5, 0.0), (-0.2, 0.05), 0.17


@dataclass(frozen=True, slots=True)
class Hospital:
    """A camera and the patients in front of it.

    `tint` multiplies red, green and blue; `blur` is in hundredths of the radius; `noise` in grey levels of
    255; `frame` is (width, height) in radii; `mix` the share of patients by grade; `words` how this hospital
    writes grades 0 to 4.
    """

    tint: tuple[float, float, float]
    gamma: float
    blur: float
    noise: float
    frame: tuple[float, float]
    mix: tuple[float, float, float, float, float]
    words: tuple[str, str, str, str, str] = NUMBERS


HOSPITALS: Mapping[str, Hospital] = {
    # A screening service: nearly everybody is healthy.
    "hospital-a": Hospital((1.0, 0.95, 0.9), 1.0, 0.6, 2, (2.8, 2.1), (0.6, 0.2, 0.15, 0.05, 0.0)),
    # An eye clinic; an older camera, reddish and soft.
    "hospital-b": Hospital((1.1, 0.75, 0.6), 1.2, 2.5, 5, (2.3, 1.8), (0.3, 0.2, 0.2, 0.15, 0.15)),
    # A referral centre: nobody comes who is healthy.
    "hospital-c": Hospital((0.9, 1.0, 1.1), 0.85, 0.9, 3, (3.2, 2.2), (0.0, 0.1, 0.3, 0.3, 0.3)),
    # A practice that writes words; severe eyes go elsewhere.
    "hospital-d": Hospital(
        (1.0, 1.1, 0.7), 1.1, 1.5, 8, (2.2, 2.2), (0.4, 0.3, 0.3, 0.0, 0.0),
        ("no DR", "mild NPDR", "moderate NPDR", "severe NPDR", "PDR"),
    ),
}  # fmt: skip


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder to write; must not hold images of an earlier call.")],
    patients: Annotated[int, typer.Option(help="Patients a hospital, two eyes each.", min=1)] = 40,
    size: Annotated[int, typer.Option(help="Height of the field of view in pixels.", min=48)] = 320,
    seed: Annotated[int, typer.Option(help="Other numbers, other images.", min=0)] = 0,
) -> None:
    """Draw both eyes of every patient of four hospitals, and write down their grades."""
    for name, hospital in HOSPITALS.items():
        folder = out / name / "images"
        if folder.exists():
            raise ConfigError(f"{folder} is there already; nothing was changed", hint="give another --out")
        folder.mkdir(parents=True)
        rng = np.random.default_rng(derive_seed(seed, "retina images", name))
        rows = []
        for patient, eye, grade in draw_patients(hospital, patients, rng):
            file = f"{patient}_{eye}.png"
            picture = photograph(draw_eye(grade, size / 2, eye == "left", rng), hospital, rng)
            picture.save(folder / file)
            rows.append((file, patient, hospital.words[grade]))
        with (out / name / "grades.csv").open("w", encoding="utf-8", newline="") as table:
            csv.writer(table, lineterminator="\n").writerows([("image", "patient", "grade"), *rows])
        typer.echo(f"{name}: {len(rows)} images of {patients} patients in {folder}")


def draw_patients(
    hospital: Hospital, patients: int, rng: np.random.Generator
) -> Iterator[tuple[str, str, int]]:
    """Patient, eye and grade; the second eye is as the first, or a grade better where the hospital has it."""
    grades = np.repeat(np.arange(5), apportion(np.array(hospital.mix), patients))
    for number, grade in enumerate(rng.permutation(grades), start=1):
        better = int(grade) - int(rng.random() < 0.3)
        other = better if better >= 0 and hospital.mix[better] else int(grade)
        yield f"p{number:03}", "left", int(grade)
        yield f"p{number:03}", "right", other


def draw_eye(grade: int, radius: float, mirrored: bool, rng: np.random.Generator) -> Picture:
    """A fundus of that grade, float [2R, 2R, 3] in [0, 1], black outside the field of view."""
    side = round(2 * radius)
    y, x = (np.mgrid[0:side, 0:side] + 0.5 - radius) / radius
    light = 1 - 0.35 * (x**2 + y**2) + 0.12 * _smooth(side, 6, rng)
    eye = light[..., None] * np.array([0.82, 0.42, 0.18]) * rng.uniform(0.9, 1.1)
    macula = np.exp(-((x - MACULA[0]) ** 2 + (y - MACULA[1]) ** 2) / 0.03)
    eye *= 1 - 0.35 * macula[..., None]
    disc = _soft(DISC_RADIUS - np.hypot(x - DISC[0], y - DISC[1]), 0.03)
    eye = _blend(eye, disc, (0.98, 0.85, 0.5), 0.85)
    eye = _blend(eye, _strokes(side, _arcades(rng)), (0.42, 0.1, 0.06), 0.75)
    eye = _lesions(eye, grade, rng)
    eye *= _soft(0.97 - np.hypot(x, y), 0.01)[..., None]
    return np.clip(eye[:, ::-1] if mirrored else eye, 0, 1)


def photograph(eye: Picture, hospital: Hospital, rng: np.random.Generator) -> Image.Image:
    """The eye as the hospital's camera stores it: tinted, blurred, noisy, in a black frame."""
    radius = len(eye) / 2
    tinted = np.clip(eye * np.array(hospital.tint) * rng.uniform(0.9, 1.1), 0, 1) ** hospital.gamma
    picture = Image.fromarray(np.uint8(np.rint(tinted * 255)))
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(hospital.blur * radius / 100)), np.float64)
    noisy = np.clip(blurred + rng.normal(0, hospital.noise, blurred.shape) * (blurred > 8), 0, 255)
    width, height = (round(part * radius) for part in hospital.frame)
    frame = Image.new("RGB", (width, height))
    shift = rng.integers(-3, 4, 2) if width > len(eye) else (0, 0)
    corner = ((width - len(eye)) // 2 + int(shift[0]), (height - len(eye)) // 2)
    frame.paste(Image.fromarray(np.uint8(np.rint(noisy))), corner)
    return frame


def _lesions(eye: Picture, grade: int, rng: np.random.Generator) -> Picture:
    """Signs of the disease. They are larger than real ones, so that small images show them."""
    side = len(eye)
    dots, bleeds, deposits, clouds = SIGNS[grade]
    eye = _blend(eye, _spots(side, dots, 0.014, 0.02, rng), (0.4, 0.05, 0.04), 0.9)
    eye = _blend(eye, _spots(side, bleeds, 0.04, 0.07, rng), (0.33, 0.04, 0.03), 0.9)
    eye = _blend(eye, _spots(side, deposits, 0.02, 0.045, rng), (0.98, 0.88, 0.4), 0.9)
    eye = _blend(eye, _spots(side, clouds, 0.06, 0.08, rng), (0.92, 0.86, 0.7), 0.6)
    if grade == 4:  # new vessels around the disc, and a bleeding before the retina
        fine = [_walk(DISC, rng.uniform(0, 2 * np.pi), 14, 0.035, 0.9, 0.012, rng) for _ in range(22)]
        eye = _blend(eye, _strokes(side, fine), (0.6, 0.08, 0.06), 0.9)
        eye = _blend(eye, _spots(side, 1, 0.16, 0.22, rng), (0.28, 0.02, 0.02), 0.95)
    return eye


def _spots(side: int, count: int, smallest: float, largest: float, rng: np.random.Generator) -> Picture:
    """Mask [side, side] of `count` ragged ellipses with radii as shares of R, off the optic disc."""
    mask = Image.new("L", (2 * side, 2 * side))
    draw = ImageDraw.Draw(mask)
    while count:
        distance, angle = 0.85 * np.sqrt(rng.random()), rng.uniform(0, 2 * np.pi)
        x, y = distance * np.cos(angle), distance * np.sin(angle)
        if np.hypot(x - DISC[0], y - DISC[1]) < 1.4 * DISC_RADIUS:
            continue
        count -= 1
        turns = np.linspace(0, 2 * np.pi, 12, endpoint=False)
        reach = rng.uniform(smallest, largest) * rng.uniform(0.75, 1.25, 12)
        corners = np.stack([x + reach * np.cos(turns), y + reach * np.sin(turns)], axis=1)
        draw.polygon([(float(a), float(b)) for a, b in (corners + 1) * side], fill=255)
    return _mask(mask, side)


Stroke = list[tuple[float, float, float]]


def _arcades(rng: np.random.Generator) -> list[Stroke]:
    """The large vessels: four bows from the disc and their branches."""
    strokes: list[Stroke] = []
    for up in (-1, 1):
        for start, bend in ((0.62 * np.pi, 0.055), (0.25 * np.pi, -0.03)):
            for wide in (0.03, 0.02):
                heading = up * (start + rng.normal(0, 0.15))
                bow = _walk(DISC, heading, 40, 0.045, 0.06, wide, rng, turn=up * bend)
                strokes.append(bow)
                for at in rng.choice(np.arange(5, 35), 6, replace=False):
                    x, y, width = bow[int(at)]
                    side_way = heading + rng.choice([-1, 1]) * rng.uniform(0.5, 1.1) + up * bend * int(at)
                    strokes.append(_walk((x, y), side_way, 16, 0.035, 0.15, width * 0.6, rng))
    return strokes


def _walk(
    start: tuple[float, float],
    heading: float,
    steps: int,
    stride: float,
    wander: float,
    width: float,
    rng: np.random.Generator,
    *,
    turn: float = 0.0,
) -> Stroke:
    """A path that wanders, thinner towards its end: (x, y, width) in radii."""
    x, y = start
    path = [(x, y, width)]
    for step in range(1, steps):
        heading += turn + rng.normal(0, wander)
        x, y = x + stride * np.cos(heading), y + stride * np.sin(heading)
        path.append((float(x), float(y), width * (1 - 0.7 * step / steps)))
    return path


def _strokes(side: int, strokes: list[Stroke]) -> Picture:
    """Mask [side, side] of paths, drawn twice as large and then reduced."""
    mask = Image.new("L", (2 * side, 2 * side))
    draw = ImageDraw.Draw(mask)
    for stroke in strokes:
        for (x0, y0, width), (x1, y1, _) in pairwise(stroke):
            line = [((x0 + 1) * side, (y0 + 1) * side), ((x1 + 1) * side, (y1 + 1) * side)]
            draw.line(line, fill=255, width=max(1, round(width * side)))
    return _mask(mask, side)


def _mask(mask: Image.Image, side: int) -> Picture:
    return np.asarray(mask.resize((side, side), Image.Resampling.BOX), dtype=np.float64) / 255


def _blend(eye: Picture, mask: Picture, colour: tuple[float, float, float], strength: float) -> Picture:
    share = strength * mask[..., None]
    blended: Picture = eye * (1 - share) + np.array(colour) * share
    return blended


def _soft(depth: Picture, width: float) -> Picture:
    """1 inside, 0 outside, a ramp of `width` between; `depth` is positive inside."""
    return np.clip(depth / width + 0.5, 0, 1)


def _smooth(side: int, points: int, rng: np.random.Generator) -> Picture:
    """Noise [side, side] of low frequency."""
    coarse: Any = Image.fromarray(rng.normal(0, 1, (points, points)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)


if __name__ == "__main__":
    run_program(app)
