"""What impressions start from: noise with a seed, or public images that the operator names; never a site's.

Legend: M images, C channels, H x W pixels, Z latent numbers, N images in a file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedcore.errors import PlanError
from fedserver.synthesis.objective import REFERENCE_SIDE

# Pixels that a point of the coarse grid stands for at 28 pixels a side (more in larger images: the noise is as smooth at
# any size), and the share of the half range that the noise spans.
COARSENESS = 4
SPREAD = 0.5

# The untrained generator: latent numbers, channels of its layers, and how far an image strays from its class.
LATENT = 64
CHANNELS = 32
STRAY = 0.5

# What marks the home of an agent (`agent.toml`, and the state that a site keeps between rounds).
_SITE_MARKS = ("agent.toml",)


@dataclass(frozen=True, slots=True)
class Style:
    """What a generator start has of its own: the class of each image [M], the number of classes, and where the
    generator's weights and its class points come from, the same in every round of a run.
    """

    labels: Tensor
    classes: int
    generator: torch.Generator


def starting_images(
    kind: str,
    shape: tuple[int, int, int, int],
    bounds: tuple[Tensor, Tensor],
    generator: torch.Generator,
    style: Style | None = None,
) -> Tensor:
    """Images [M, C, H, W] in normalised units within `bounds`, a low and a high that broadcast over them.

    "smooth": noise of low frequency around mid-grey, which leads to smooth impressions; "white": independent
    pixels, as published, which leads to something close to adversarial noise; "generator": an untrained
    generator's images of noise around one point a class, which needs a `style`.
    """
    if shape[0] == 0:
        return torch.empty(shape)
    if kind == "generator":
        assert style is not None
        noise = _generated(shape, style, generator)
    else:
        noise = _smooth(shape, generator) if kind == "smooth" else torch.randn(shape, generator=generator)
    low, high = bounds
    images = (low + high) / 2 + SPREAD * (high - low) / 2 * noise
    return images.clamp(low, high)


def _smooth(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Noise [M, C, H, W] of low frequency with zero mean and unit deviation a channel."""
    count, channels, height, width = shape
    step = COARSENESS * max(1.0, min(height, width) / REFERENCE_SIDE)
    coarse = (max(2, math.ceil(height / step)), max(2, math.ceil(width / step)))
    points = torch.randn((count, channels, *coarse), generator=generator)
    noise = F.interpolate(points, size=(height, width), mode="bicubic", align_corners=True)
    return noise / noise.std(dim=(2, 3), keepdim=True, correction=0).clamp_min(1e-6)


def _generated(shape: tuple[int, int, int, int], style: Style, generator: torch.Generator) -> Tensor:
    """Images [M, C, H, W] of an untrained generator.

    From 1/8 of the size, three times: twice as large, a random convolution, a leaky ReLU. Latents are gaussian
    around a point a class; the images of those points give the unit of the result. Source: Tang et al. 2022,
    "Virtual Homogeneity Learning" (VHL, arXiv:2206.02465), there an untrained StyleGAN.
    """
    count, channels, height, width = shape
    rows, columns = max(2, -(-height // 8)), max(2, -(-width // 8))
    points_KZ = torch.randn((style.classes, LATENT), generator=style.generator)
    strays_MZ = STRAY * torch.randn((count, LATENT), generator=generator)
    latents = torch.cat([points_KZ, points_KZ[style.labels] + strays_MZ])
    first = torch.randn((LATENT, CHANNELS * rows * columns), generator=style.generator) / LATENT**0.5
    x = (latents @ first).view(-1, CHANNELS, rows, columns)
    for _ in range(3):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        kernel = torch.randn((CHANNELS, CHANNELS, 3, 3), generator=style.generator) / (CHANNELS * 9) ** 0.5
        x = F.leaky_relu(F.conv2d(x, kernel, padding=1), 0.2) * 2**0.5
    kernel = torch.randn((channels, CHANNELS, 1, 1), generator=style.generator) / CHANNELS**0.5
    x = F.interpolate(F.conv2d(x, kernel), size=(height, width), mode="bilinear", align_corners=False)
    points, images = x[: style.classes], x[style.classes :]
    deviation = points.std(dim=(0, 2, 3), keepdim=True, correction=0).clamp_min(1e-6)
    return (images - points.mean(dim=(0, 2, 3), keepdim=True)) / deviation


def public_images(path: Path, size: tuple[int, int, int], forbidden: Sequence[Path] = ()) -> np.ndarray:
    """An operator's public images, uint8 [N, H, W, C] of the model's size, from an npz's `images`.

    `forbidden` are folders of sites; a file inside one, or inside any agent's home, is refused: a start made
    of a site's images would carry them to all others. Raises PlanError.
    """
    who = f"strategy_options.start_images: {path}"
    if not path.is_absolute():
        raise PlanError(f"{who}: expected an absolute path on the coordinator's disk")
    real = path.resolve()
    homes = [folder for folder in real.parents if any((folder / mark).exists() for mark in _SITE_MARKS)]
    homes += [folder for folder in forbidden if real.is_relative_to(folder.resolve())]
    if homes:
        raise PlanError(
            f"{who}: lies inside a site's home, {homes[0]}",
            hint="impressions must never start from a site's images: name public ones",
        )
    try:
        with np.load(real, allow_pickle=False) as archive:
            if "images" not in archive.files:
                raise PlanError(f"{who}: holds {sorted(archive.files)[:6]}, expected 'images'")
            images = archive["images"]
    except (OSError, ValueError, EOFError) as error:
        raise PlanError(f"{who}: not an npz of images: {error}") from error
    if images.ndim == 3:
        images = images[..., None]
    channels, height, width = size
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels) or not len(images):
        raise PlanError(
            f"{who}: images are {images.dtype} {list(images.shape)},"
            f" expected uint8 [N, {height}, {width}, {channels}] with N > 0"
        )
    found: np.ndarray = images
    return found
