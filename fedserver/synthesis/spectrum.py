"""Images as the coefficients of a cosine transform, so that an optimiser moves smooth patterns first.

An optimiser that moves pixels one by one, above all Adam, whose steps do not shrink with the gradient, ends in fine
grain that only the model at hand sees. Moving coefficients that count the less the higher their frequency can give
what other nets see too: docs/results/notes.md says where it did and where it did not. Source: Olah et al. 2017,
"Feature Visualization", there with a Fourier transform; the cosine transform has no edge to wrap around.

Legend: M images, C channels, H x W pixels.
"""

import math

import torch
from torch import Tensor

# A coefficient of frequency (u, v), in half waves a side, counts (1 + sqrt(u^2 + v^2))^-FALL: amplitudes of
# photographs fall with about the first power, and a gradient step feels the fall twice.
FALL = 2.0


class CosineSpace:
    """Images of one size <-> coefficients [M, C, H, W], without a loss."""

    def __init__(self, height: int, width: int, like: Tensor) -> None:
        """`like` gives device and dtype."""
        self._down_HH = cosine_basis(height).to(like)
        self._across_WW = cosine_basis(width).to(like)
        self._weight_HW = falling_weights(height, width).to(like)

    def images(self, coefficients_MCHW: Tensor) -> Tensor:
        """Images [M, C, H, W] of coefficients, differentiable."""
        weighted_MCHW = coefficients_MCHW * self._weight_HW
        images_MCHW: Tensor = self._down_HH.T @ weighted_MCHW @ self._across_WW
        return images_MCHW

    def coefficients(self, images_MCHW: Tensor) -> Tensor:
        """Coefficients [M, C, H, W] of images."""
        coefficients_MCHW: Tensor = self._down_HH @ images_MCHW @ self._across_WW.T / self._weight_HW
        return coefficients_MCHW


def cosine_basis(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) [size, size] in float64: a row a frequency."""
    places = (torch.arange(size, dtype=torch.float64) + 0.5) * math.pi / size
    rows = torch.cos(torch.arange(size, dtype=torch.float64)[:, None] * places) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows


def falling_weights(height: int, width: int) -> Tensor:
    """What a coefficient counts [H, W] in float64, root mean square 1:

    a step of the same size in every coefficient moves pixels by that size on average.
    """
    down_H1 = torch.arange(height, dtype=torch.float64)[:, None]
    across_W = torch.arange(width, dtype=torch.float64)
    weight_HW = (1 + (down_H1.square() + across_W.square()).sqrt()) ** -FALL
    return weight_HW / weight_HW.square().mean().sqrt()
