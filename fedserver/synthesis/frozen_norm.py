"""BatchNorm of a frozen model, as synthesis needs it: one affine map, and the statistics of what goes in.

PyTorch's own layer in eval mode computes in its backward pass what only training needs, and statistics by plain
autograd pass over the activations ten more times: together they were half of a synthesis step on a CPU.

Legend: N images, C channels, H x W pixels, R = N H W.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedserver.synthesis.objective import LayerStatistics


class _Layered(Protocol):
    def modules(self) -> Iterator[nn.Module]: ...


class _Moments(torch.autograd.Function):
    """Mean and biased variance [C] of [N, C, ...], in float32; one pass back over the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        # Rows of channels: a view where channels lie last. `var_mean` is several times slower here.
        rows_RC = x.movedim(1, -1).flatten(0, -2)
        mean_C = rows_RC.mean(0, dtype=torch.float32)
        variance_C = (rows_RC.square().mean(0, dtype=torch.float32) - mean_C.square()).clamp_min(0)
        ctx.save_for_backward(x, mean_C)
        return mean_C, variance_C

    @staticmethod
    def backward(ctx: Any, of_mean_C: Tensor, of_variance_C: Tensor) -> Tensor:
        x, mean_C = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        slope_C = 2 / count * of_variance_C
        return torch.addcmul(
            _along(of_mean_C / count - slope_C * mean_C, x).to(x.dtype), x, _along(slope_C, x).to(x.dtype)
        )


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of [N, C, ...] over all else, in float32, differentiable once."""
    mean_C, variance_C = _Moments.apply(x)  # type: ignore[no-untyped-call]
    return mean_C, variance_C


@contextmanager
def frozen_norms(model: _Layered, *, record: bool) -> Iterator[list[LayerStatistics]]:
    """Within, the BatchNorm layers of `model` are affine maps by what they have stored.

    If `record`, every forward pass adds the input statistics of each to the list given. Layers without stored
    statistics are left as they are.
    """
    recorded: list[LayerStatistics] = []
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    for layer in layers:
        layer.forward = partial(_affine, layer, recorded if record else None)  # type: ignore[method-assign]
    try:
        yield recorded
    finally:
        for layer in layers:
            del layer.forward


def _affine(layer: _BatchNorm, recorded: list[LayerStatistics] | None, x: Tensor) -> Tensor:
    stored_mean, stored_variance = layer.running_mean, layer.running_var
    assert stored_mean is not None
    assert stored_variance is not None
    if recorded is not None:
        recorded.append(LayerStatistics(*moments(x), stored_mean, stored_variance, layer.eps))
    scale_C = (stored_variance + layer.eps).rsqrt()
    if layer.weight is not None:
        scale_C = scale_C * layer.weight
    shift_C = -stored_mean * scale_C
    if layer.bias is not None:
        shift_C = shift_C + layer.bias
    return torch.addcmul(_along(shift_C, x).to(x.dtype), x, _along(scale_C, x).to(x.dtype))


def _along(values_C: Tensor, x: Tensor) -> Tensor:
    """Values [C] in a shape that broadcasts over [N, C, ...]."""
    return values_C.view(1, -1, *(1,) * (x.dim() - 2))
