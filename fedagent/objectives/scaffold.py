"""SCAFFOLD's objective: cross-entropy whose gradient is corrected by control variates.

Every step adds c - c_i, the drift of this site's mean gradient c_i from the federation's c. The site's variate
stays here; what changed of it travels with the update, and the coordinator sends c with the next round.

Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
arXiv:1910.06378, Algorithm 1, option II. With momentum the plan's learning rate does not say how far a gradient
carries; the length of the path is then counted as by Wang et al. 2020 (FedNova), arXiv:2007.07481, section 4.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fedagent.objectives.base import (
    Batch,
    Ending,
    LocalContext,
    LocalObjective,
    ObjectiveOptions,
    Outputs,
)
from fedagent.objectives.cross_entropy import AdjustedOptions, adjusted_cross_entropy
from fedcore.errors import PlanError
from fedcore.tensor_file import EXTRA_PREFIX

# The name of both variates: the coordinator's in its state, the site's in what it keeps, its change on the way.
VARIATE = "variate"


class ControlVariates(LocalObjective):
    """Mean cross-entropy + <c - c_i, w>: the term is worth nothing, only its gradient counts."""

    name: ClassVar[str] = "scaffold"
    Options: ClassVar[type[ObjectiveOptions]] = AdjustedOptions
    options: AdjustedOptions

    def begin(self, context: LocalContext) -> None:
        """Work out this round's correction. Raises PlanError for an optimiser other than SGD."""
        if context.training.optimizer != "sgd":
            raise PlanError(f"scaffold: training.optimizer is '{context.training.optimizer}', expected 'sgd'")
        self._corrections: list[tuple[Tensor, Tensor]] = []
        for name, parameter in _trained(context).items():
            correction = _variate(context.strategy_state, name, parameter) - _variate(
                context.kept, name, parameter
            )
            self._corrections.append((parameter, correction))

    def loss(self, batch: Batch, outputs: Outputs, context: LocalContext) -> Tensor:
        """Cross-entropy, with the corrected gradient: a scalar."""
        loss = adjusted_cross_entropy(batch, outputs, context, self.options)
        drift = torch.stack([(p * correction).sum() for p, correction in self._corrections]).sum()
        return loss + (drift - drift.detach())

    def end(self, context: LocalContext, num_steps: int) -> Ending:
        """The new variate c_i - c + (x - y_i) / path stays, its change c_i+ - c_i travels."""
        path = path_length(context.learning_rate, context.training.momentum, num_steps)
        start = dict(context.global_model.named_parameters())
        kept, extras = {}, {}
        for name, parameter in _trained(context).items():
            own = _variate(context.kept, name, parameter)
            shared = _variate(context.strategy_state, name, parameter)
            change = (start[name] - parameter.detach()) / path - shared
            kept[f"{VARIATE}/{name}"] = own + change
            extras[f"{EXTRA_PREFIX}{VARIATE}/{name}"] = change
        return Ending(extras=extras, kept=kept)


def path_length(learning_rate: float, momentum: float, num_steps: int) -> float:
    """How far SGD with momentum carries a constant gradient of one in `num_steps` steps from rest."""
    velocity = distance = 0.0
    for _ in range(num_steps):
        velocity = momentum * velocity + 1.0
        distance += learning_rate * velocity
    return distance


def _trained(context: LocalContext) -> dict[str, Tensor]:
    return {name: p for name, p in context.model.named_parameters() if p.requires_grad}


def _variate(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    found = tensors.get(f"{VARIATE}/{name}")
    return found if found is not None else torch.zeros_like(like, requires_grad=False)
