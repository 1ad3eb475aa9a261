"""What a bad site sends in place of its update, for studies of the gate and of robust aggregation. Nothing else uses it.

An attack changes what was trained (and what the strategy adds); BatchNorm statistics and counters stay honest, since a
variance below zero would give it away.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from fedcore.tensor_file import EXTRA_PREFIX

# The update times ten; times minus one; times minus ten; NaN; Gaussian noise of ten times its size.
Attack = Literal["scaled", "sign_flipped", "reversed", "nan", "random"]
ATTACKS: tuple[Attack, ...] = get_args(Attack)
FACTOR = 10.0


def attacked(
    attack: Attack, start: Mapping[str, Tensor], end: Mapping[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    """The tensors that a bad site sends who trained from `start` to `end`; tensors that `start` lacks began at zero."""
    return {
        name: _attacked(attack, start.get(name, torch.zeros_like(tensor)), tensor, generator)
        if _is_trained(name, tensor)
        else tensor
        for name, tensor in end.items()
    }


def _is_trained(name: str, tensor: Tensor) -> bool:
    statistic = name.rpartition(".")[2].startswith("running_") and not name.startswith(EXTRA_PREFIX)
    return tensor.is_floating_point() and not statistic


def _attacked(attack: Attack, start: Tensor, end: Tensor, generator: torch.Generator) -> Tensor:
    change = end - start
    match attack:
        case "scaled":
            return start + FACTOR * change
        case "sign_flipped":
            return start - change
        case "reversed":
            return start - FACTOR * change
        case "nan":
            return torch.full_like(end, torch.nan)
        case "random":
            scale = FACTOR * change.square().mean().sqrt() if change.numel() else 0.0
            return start + scale * torch.randn(end.shape, generator=generator, dtype=end.dtype)
