"""The cosine transform that impressions move in."""

import math

import pytest
import torch

from fedserver.synthesis.spectrum import FALL, CosineSpace, cosine_basis, falling_weights


@pytest.mark.parametrize("size", [1, 2, 8, 28])
def test_the_basis_is_orthonormal(size):
    basis = cosine_basis(size)
    assert torch.allclose(basis @ basis.T, torch.eye(size, dtype=torch.float64), atol=1e-12)


def test_the_basis_by_hand():
    half = math.sqrt(0.5)
    assert torch.allclose(cosine_basis(2), torch.tensor([[half, half], [half, -half]], dtype=torch.float64))


def test_weights_fall_with_frequency_and_have_unit_mean_square():
    weights = falling_weights(4, 6)
    assert weights.square().mean().item() == pytest.approx(1)
    assert (weights[0, 0] / weights[3, 4]).item() == pytest.approx((1 + 5) ** FALL)
    assert (weights[:, :-1] > weights[:, 1:]).all()
    assert (weights[:-1] > weights[1:]).all()


@pytest.mark.parametrize("size", [(8, 8), (5, 12), (1, 1)])
def test_there_and_back(size):
    images = torch.randn(3, 2, *size, generator=torch.Generator().manual_seed(0))
    space = CosineSpace(*size, images)
    assert torch.allclose(space.images(space.coefficients(images)), images, atol=1e-4)


def test_a_flat_image_is_one_coefficient():
    space = CosineSpace(4, 4, torch.zeros(1))
    coefficients = space.coefficients(torch.ones(1, 1, 4, 4))
    # Orthonormal: the square root of 16 pixels, over its weight.
    assert coefficients[0, 0, 0, 0].item() == pytest.approx(4 / falling_weights(4, 4)[0, 0].item(), rel=1e-5)
    assert coefficients.flatten()[1:].abs().max() < 1e-4


def test_gradients_pass():
    coefficients = torch.randn(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(CosineSpace(3, 4, coefficients).images, [coefficients])
