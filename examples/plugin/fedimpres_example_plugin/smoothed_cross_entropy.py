"""The objective `smoothed_cross_entropy`: cross-entropy with label smoothing.

Source: Szegedy et al. 2016, Rethinking the Inception Architecture for Computer Vision, section 7.
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from fedagent.objectives.base import Batch, LocalContext, LocalObjective, ObjectiveOptions, Outputs


class SmoothedOptions(ObjectiveOptions):
    """`smoothing` is the share of the target that all classes get alike."""

    smoothing: float = Field(0.1, ge=0, lt=1)


class SmoothedCrossEntropy(LocalObjective):
    """Mean cross-entropy against smoothed labels."""

    name: ClassVar[str] = "smoothed_cross_entropy"
    Options: ClassVar[type[ObjectiveOptions]] = SmoothedOptions
    options: SmoothedOptions

    def loss(self, batch: Batch, outputs: Outputs, context: LocalContext) -> Tensor:
        """The loss of a batch, a scalar."""
        logits = outputs.logits.float()
        return F.cross_entropy(logits, batch.labels, label_smoothing=self.options.smoothing)
