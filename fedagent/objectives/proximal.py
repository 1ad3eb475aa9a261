"""FedProx's objective: cross-entropy plus a pull towards the global model.

Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", arXiv:1812.06127, Algorithm 2.
"""

from collections.abc import Iterable
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedagent.objectives.base import Batch, LocalContext, LocalObjective, ObjectiveOptions, Outputs
from fedagent.objectives.cross_entropy import AdjustedOptions, adjusted_cross_entropy


class ProximalOptions(AdjustedOptions):
    """`mu` weighs the squared distance to the global model; 0 is plain cross-entropy."""

    mu: float = Field(0.01, ge=0)


class Proximal(LocalObjective):
    """Mean cross-entropy + mu/2 * ||w - w_global||^2 over the trained parameters."""

    name: ClassVar[str] = "proximal"
    Options: ClassVar[type[ObjectiveOptions]] = ProximalOptions
    options: ProximalOptions

    def loss(self, batch: Batch, outputs: Outputs, context: LocalContext) -> Tensor:
        """Cross-entropy plus the proximal term, a scalar."""
        loss = adjusted_cross_entropy(batch, outputs, context, self.options)
        if self.options.mu == 0:
            return loss
        return loss + self.options.mu / 2 * squared_distance(context.parameter_pairs)


def squared_distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Sum over tensors of ||a - b||^2, in float32: a scalar."""
    return torch.stack([(a.float() - b.float()).square().sum() for a, b in pairs]).sum()
