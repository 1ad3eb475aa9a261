"""BatchNorm of a frozen model: the same answer and the same gradients as PyTorch's own, for less."""

import pytest
import torch
from torch import nn

from fedserver.synthesis.frozen_norm import frozen_norms, moments


def a_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )
    model(torch.randn(16, 3, 9, 9) * 2 + 1)
    for layer in (model[1], model[4]):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return model.eval().requires_grad_(False)


def test_answers_and_gradients_are_those_of_batch_norm() -> None:
    model = a_model()
    images = torch.randn(6, 3, 9, 9, requires_grad=True)
    plain = model(images)
    (expected,) = torch.autograd.grad(plain.square().sum(), [images])
    with frozen_norms(model, record=False) as layers:
        found = model(images)
        (gradient,) = torch.autograd.grad(found.square().sum(), [images])
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
    assert layers == []


def test_statistics_are_those_of_the_input_of_each_layer() -> None:
    model = a_model()
    images = torch.randn(6, 3, 9, 9)
    first = model[0](images)
    with frozen_norms(model, record=True) as layers:
        model(images)
    assert len(layers) == 2
    torch.testing.assert_close(layers[0].mean, first.mean((0, 2, 3)))
    torch.testing.assert_close(layers[0].variance, first.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)
    assert layers[1].stored_mean is model[4].running_mean


@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (7, 3)])
def test_moments_are_differentiated_right(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    over = [d for d in range(x.dim()) if d != 1]
    weights = torch.randn(2, 3)
    (expected,) = torch.autograd.grad(
        (weights * torch.stack([x.mean(over), x.var(over, correction=0)])).sum(), [x]
    )
    (found,) = torch.autograd.grad((weights * torch.stack(moments(x))).sum(), [x])
    torch.testing.assert_close(found, expected)


def test_layers_are_themselves_again_even_after_an_error() -> None:
    model = a_model()
    with pytest.raises(ZeroDivisionError), frozen_norms(model, record=True):
        raise ZeroDivisionError
    assert "forward" not in vars(model[1])
    model.train()
    before = model[1].running_mean.clone()
    model(torch.randn(4, 3, 9, 9))
    assert not torch.equal(before, model[1].running_mean)


def test_a_layer_without_stored_statistics_is_left_alone() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    images = torch.randn(4, 3, 5, 5)
    with frozen_norms(model, record=True) as layers:
        torch.testing.assert_close(model(images), nn.BatchNorm2d(3)(images))
    assert layers == []
