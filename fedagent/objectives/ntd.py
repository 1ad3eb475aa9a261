"""FedNTD's objective: cross-entropy, while what the global model says of all other classes is kept.

Only the classes that an image does not have are distilled, so that the site learns its own and forgets none.

Source: Lee et al. 2022, "Preservation of the Global Knowledge by Not-True Distillation in Federated Learning",
arXiv:2106.03097, equations 4 to 6.

Legend: N images in a batch, K classes.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedagent.objectives.base import Batch, LocalContext, LocalObjective, ObjectiveOptions, Outputs
from fedagent.objectives.cross_entropy import AdjustedOptions, adjusted_cross_entropy


class NotTrueOptions(AdjustedOptions):
    """`beta` weighs the distillation, `temperature` softens both answers."""

    beta: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0)


class NotTrueDistillation(LocalObjective):
    """Mean cross-entropy + beta * divergence of the not-true classes from the global model."""

    name: ClassVar[str] = "ntd"
    Options: ClassVar[type[ObjectiveOptions]] = NotTrueOptions
    options: NotTrueOptions

    def loss(self, batch: Batch, outputs: Outputs, context: LocalContext) -> Tensor:
        """Cross-entropy plus the distillation, a scalar."""
        loss = adjusted_cross_entropy(batch, outputs, context, self.options)
        if self.options.beta == 0:
            return loss
        with torch.no_grad():
            global_NK = context.global_model(batch.images)
        distillation = not_true_divergence(
            outputs.logits, global_NK, batch.labels, temperature=self.options.temperature
        )
        return loss + self.options.beta * distillation


def not_true_divergence(
    logits_NK: Tensor, global_NK: Tensor, labels_N: Tensor, *, temperature: float
) -> Tensor:
    """Mean KL(global || local) over the softmax of the K - 1 other classes, times temperature^2: a scalar."""
    local_NJ = not_true(logits_NK, labels_N).float() / temperature
    target_NJ = not_true(global_NK, labels_N).float() / temperature
    divergence = F.kl_div(
        local_NJ.log_softmax(1), target_NJ.log_softmax(1), reduction="batchmean", log_target=True
    )
    return divergence * temperature**2


def not_true(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """Logits [N, K - 1] without the one of each image's own class."""
    classes = logits_NK.shape[1]
    others_NK = torch.arange(classes, device=logits_NK.device) != labels_N[:, None]
    return logits_NK[others_NK].view(len(logits_NK), classes - 1)
