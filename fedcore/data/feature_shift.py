# ruff: noqa: N803 - shape suffixes
"""Feature shift: each site's images look as if another laboratory had made them. numpy only.

A site has one fixed change of stain, blur, brightness and noise, drawn from its seed; labels are untouched. Stain
scales the optical density of each channel (Beer-Lambert: intensity is light x 10^-density), so white stays white.
Sources: Tellez et al. 2019, Quantifying the effects of data augmentation and stain color normalization in
convolutional neural networks for computational pathology (stain, brightness, blur, noise as what laboratories
differ in); Li et al. 2022, Federated Learning on Non-IID Data Silos, section 4.2 (a fixed change a site).

The same `Shift` gives the same pixels on every machine: tables and sums in float64, no transcendental function of
a pixel. Legend: N images, H x W pixels, C channels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcore.data.dataset import ImageArray
from fedcore.seeding import derive_seed

# At strength 1: densities are scaled by 2/3 to 3/2, and so on.
MOST_STAIN, MOST_BRIGHTNESS, MOST_BLUR_PX, MOST_NOISE = math.log(1.5), 24.0, 0.8, 12.0
_BATCH = 256


@dataclass(frozen=True, slots=True)
class Shift:
    """A site's change. `stain` scales each channel's density; the rest is in pixel levels of 0..255 and in pixels.

    `blur_px` and `noise` are standard deviations; the noise is drawn from `seed`.
    """

    stain: tuple[float, ...]
    brightness: float
    blur_px: float
    noise: float
    seed: int


def draw_shift(strength: float, channels: int, *, seed: int) -> Shift:
    """Draw a site's change: each part uniform within `strength` times its most. `strength` is above 0."""
    rng = np.random.default_rng(derive_seed(seed, "shift"))
    return Shift(
        stain=tuple(math.exp(strength * MOST_STAIN * draw) for draw in rng.uniform(-1, 1, channels).tolist()),
        brightness=strength * MOST_BRIGHTNESS * float(rng.uniform(-1, 1)),
        blur_px=strength * MOST_BLUR_PX * float(rng.uniform()),
        noise=strength * MOST_NOISE * float(rng.uniform()),
        seed=derive_seed(seed, "noise"),
    )


def apply_shift(images_NHWC: ImageArray, shift: Shift, split: str) -> ImageArray:
    """The images as the site would see them; `split` tells the noise of training images from that of test images."""
    assert images_NHWC.shape[3] == len(shift.stain)
    rng = np.random.default_rng(derive_seed(shift.seed, split))
    parts = list(_shifted(images_NHWC, shift, rng))
    return np.concatenate(parts) if parts else images_NHWC.copy()


def _shifted(images_NHWC: ImageArray, shift: Shift, rng: np.random.Generator) -> Iterator[ImageArray]:
    tables = [_stain_table(scale) for scale in shift.stain]
    for start in range(0, len(images_NHWC), _BATCH):
        batch = images_NHWC[start : start + _BATCH]
        levels = np.stack([table[batch[..., c]] for c, table in enumerate(tables)], axis=-1)
        for axis in (1, 2):
            levels = _blurred(levels, shift.blur_px, axis)
        levels = levels + shift.brightness + shift.noise * rng.standard_normal(levels.shape)
        yield np.rint(levels).clip(0, 255).astype(np.uint8)


def _stain_table(scale: float) -> NDArray[np.float64]:
    """Level 0..255 -> level with the optical density scaled; black is 1/256 of the light, not none."""
    return np.array([256.0 * ((level + 1) / 256.0) ** scale - 1.0 for level in range(256)])


def _blurred(levels_NHWC: NDArray[np.float64], deviation_px: float, axis: int) -> NDArray[np.float64]:
    """Gaussian blur along an axis, the edge repeated."""
    radius = math.ceil(3 * deviation_px)
    if not radius:
        return levels_NHWC
    weights = [math.exp(-0.5 * (offset / deviation_px) ** 2) for offset in range(-radius, radius + 1)]
    total = math.fsum(weights)
    padding = [(radius, radius) if a == axis else (0, 0) for a in range(4)]
    padded = np.pad(levels_NHWC, padding, mode="edge")
    size = levels_NHWC.shape[axis]
    result = np.zeros_like(levels_NHWC)
    for offset, weight in enumerate(weights):
        window = [slice(None)] * 4
        window[axis] = slice(offset, offset + size)
        result += (weight / total) * padded[tuple(window)]
    return result
