"""Draw surface images of five classes for trying the example out: python make_images.py --out DIR.

    OUT/PLANT/train/CLASS/*.png      OUT/PLANT/test/CLASS/*.png      OUT/incoming/PLANT_CLASS_NUMBER.png

Three plants look at their parts under other lights, and each has never seen one or two of the defects. `incoming`
holds what none of them has trained on: every class under every light, as it comes when a defect turns up at a plant
for the first time. They are drawings; the same arguments give the same images.

Legend: H x W pixels of a surface, grey levels from 0 (black) to 1 (white).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from fedcore.errors import ConfigError
from fedcore.program import run_program
from fedcore.seeding import derive_seed

Surface = NDArray[np.float64]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
# Masks are drawn so many times larger and then reduced: smooth edges.
SCALE = 3


@dataclass(frozen=True, slots=True)
class Plant:
    """A line's surface, light and camera, and which defects have never occurred there.

    `level` and `fall` are the surface's grey and how much the light falls off across it, `angle` the light's
    direction in degrees; `grain` the strength of the brushing, along which the surface is smooth over `run`
    pixels; `noise` in grey levels; `blur` in pixels.
    """

    level: float
    fall: float
    angle: float
    grain: float
    run: int
    noise: float
    blur: float
    unseen: tuple[str, ...]


PLANTS: Mapping[str, Plant] = {
    # Brushed steel under a bright side light.
    "plant-north": Plant(0.70, 0.15, 20, 0.10, 25, 0.02, 0.4, ("crack",)),
    # Cast iron in a dim hall.
    "plant-south": Plant(0.42, 0.25, 110, 0.07, 3, 0.04, 0.7, ("stain", "scratch")),
    # Painted sheet metal under a dome light; an older camera.
    "plant-east": Plant(0.58, 0.05, 250, 0.02, 6, 0.05, 1.0, ("pit",)),
}


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    images: Annotated[int, typer.Option(help="Training images of each class at a plant.", min=1)] = 60,
    size: Annotated[int, typer.Option(help="Pixels a side.", min=32)] = 64,
    seed: Annotated[int, typer.Option(help="Other numbers, other images.", min=0)] = 0,
) -> None:
    """Draw three plants' images, a quarter as many to test on, and as many again as `incoming`."""
    if out.exists():
        raise ConfigError(f"{out} is there already; nothing was changed", hint="give another --out")
    held_out = max(1, images // 4)
    for name, plant in PLANTS.items():
        rng = np.random.default_rng(derive_seed(seed, "factory images", name))
        for label, draw in DEFECTS.items():
            targets = [out / "incoming" / f"{name}_{label}_{n:03}.png" for n in range(held_out)]
            if label not in plant.unseen:
                for split, count in (("train", images), ("test", held_out)):
                    targets += [out / name / split / label / f"{n:04}.png" for n in range(count)]
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
                take_picture(draw(surface(plant, size, rng), rng), plant, rng).save(target)
        typer.echo(f"{name}: {images} images a class to train on, none of {', '.join(plant.unseen)}")
    typer.echo(f"{out / 'incoming'}: {held_out} images of every class and plant, for score_folder.py")


def surface(plant: Plant, size: int, rng: np.random.Generator) -> Surface:
    """A sound surface [H, W] under the plant's light."""
    y, x = np.mgrid[0:size, 0:size] / size - 0.5
    angle = np.deg2rad(plant.angle + rng.normal(0, 5))
    light = plant.level * rng.uniform(0.92, 1.08) * (1 + plant.fall * (x * np.cos(angle) + y * np.sin(angle)))
    threads = rng.normal(0, 1, (size, size + plant.run))
    sums = np.cumsum(threads, axis=1)
    brushed = (sums[:, plant.run :] - sums[:, : -plant.run]) / np.sqrt(plant.run)
    grey: Surface = light + plant.grain * plant.level * brushed * 0.5
    return grey


def take_picture(grey: Surface, plant: Plant, rng: np.random.Generator) -> Image.Image:
    """The surface as the plant's camera stores it: blurred, noisy, 8 bits."""
    noisy = np.clip(grey + rng.normal(0, plant.noise, grey.shape), 0, 1)
    picture = Image.fromarray(np.uint8(np.rint(noisy * 255)))
    return picture.filter(ImageFilter.GaussianBlur(plant.blur))


def none(grey: Surface, rng: np.random.Generator) -> Surface:
    """No defect."""
    return grey


def scratch(grey: Surface, rng: np.random.Generator) -> Surface:
    """One to three straight, thin, bright lines, nearly parallel."""
    size = len(grey)
    mask, draw = _canvas(size)
    angle = rng.uniform(0, np.pi)
    for _ in range(rng.integers(1, 4)):
        x, y = rng.uniform(0.25, 0.75, 2) * size * SCALE
        turn, reach = angle + rng.normal(0, 0.08), rng.uniform(0.25, 0.5) * size * SCALE
        ends = [(x + s * reach * np.cos(turn), y + s * reach * np.sin(turn)) for s in (-1, 1)]
        draw.line(ends, fill=255, width=max(2, round(size * SCALE / 60)))
    return _toned(grey, mask, 1.5)


def pit(grey: Surface, rng: np.random.Generator) -> Surface:
    """A few round holes, dark with a bright lower rim."""
    size = len(grey)
    holes, draw_holes = _canvas(size)
    rims, draw_rims = _canvas(size)
    for _ in range(rng.integers(2, 6)):
        x, y = rng.uniform(0.12, 0.88, 2) * size * SCALE
        r = rng.uniform(0.025, 0.055) * size * SCALE
        draw_rims.ellipse((x - 1.1 * r, y - 0.7 * r, x + 1.1 * r, y + 1.5 * r), fill=255)
        draw_holes.ellipse((x - r, y - r, x + r, y + r), fill=255)
    return _toned(_toned(grey, rims, 1.3), holes, 0.35)


def crack(grey: Surface, rng: np.random.Generator) -> Surface:
    """A dark, jagged line across the surface that forks."""
    size = len(grey)
    mask, draw = _canvas(size)
    heading = rng.uniform(0, 2 * np.pi)
    starts = [(0.5 - 0.35 * np.cos(heading), 0.5 - 0.35 * np.sin(heading), heading, 16)]
    while starts:
        x, y, turn, steps = starts.pop()
        for step in range(steps):
            turn += rng.normal(0, 0.5) + 0.3 * np.sin(heading - turn)
            onward = (x + 0.055 * np.cos(turn), y + 0.055 * np.sin(turn))
            line = [
                (x * size * SCALE, y * size * SCALE),
                (onward[0] * size * SCALE, onward[1] * size * SCALE),
            ]
            draw.line(line, fill=255, width=max(2, round(size * SCALE * rng.uniform(0.012, 0.03))))
            (x, y) = onward
            if steps == 16 and step in (5, 10):
                starts.append((x, y, turn + rng.choice([-1, 1]) * 0.9, 5))
    return _toned(grey, mask, 0.3)


def stain(grey: Surface, rng: np.random.Generator) -> Surface:
    """A large blot with a soft edge, a little darker than the surface."""
    size = len(grey)
    mask, draw = _canvas(size)
    x, y = rng.uniform(0.3, 0.7, 2)
    turns = np.linspace(0, 2 * np.pi, 14, endpoint=False)
    reach = rng.uniform(0.15, 0.3) * rng.uniform(0.7, 1.3, 14)
    corners = np.stack([x + reach * np.cos(turns), y + reach * np.sin(turns)], axis=1) * size * SCALE
    draw.polygon([(float(a), float(b)) for a, b in corners], fill=255)
    return _toned(grey, mask.filter(ImageFilter.GaussianBlur(size * SCALE / 40)), 0.68)


DEFECTS: Mapping[str, Callable[[Surface, np.random.Generator], Surface]] = {
    "none": none,
    "scratch": scratch,
    "pit": pit,
    "crack": crack,
    "stain": stain,
}


def _canvas(size: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    mask = Image.new("L", (size * SCALE, size * SCALE))
    return mask, ImageDraw.Draw(mask)


def _toned(grey: Surface, mask: Image.Image, factor: float) -> Surface:
    """The surface with its grey multiplied by `factor` under the mask."""
    share = np.asarray(mask.resize(grey.shape, Image.Resampling.BOX), dtype=np.float64) / 255
    toned: Surface = grey * (1 + (factor - 1) * share)
    return toned


if __name__ == "__main__":
    run_program(app)
