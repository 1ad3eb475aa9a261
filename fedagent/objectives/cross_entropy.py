"""Cross-entropy, plain or calibrated by the site's own class frequencies: what sites of most strategies minimise.

Sources of the calibration: Ren et al. 2020, "Balanced Meta-Softmax for Long-Tailed Visual Recognition",
arXiv:2007.10740, and Menon et al. 2021, "Long-Tail Learning via Logit Adjustment", arXiv:2007.07314 ("log");
Zhang et al. 2022, "Federated Learning with Label Distribution Skew via Logits Calibration", arXiv:2209.00189
("fourth_root").

Legend: N images in a batch, K classes.
"""

from typing import ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fedagent.objectives.base import Batch, LocalContext, LocalObjective, ObjectiveOptions, Outputs
from fedagent.objectives.logit_adjustment import log_prior

# Images that a class without any counts as under "fourth_root": its logit then leaves the softmax, so that
# training does not unlearn what the site can't see.
ABSENT_COUNT = 1e-8


class AdjustedOptions(ObjectiveOptions):
    """`logit_adjustment` scales the calibration of `calibration`'s form; 0 is plain cross-entropy."""

    logit_adjustment: float = Field(0.0, ge=0)
    calibration: Literal["log", "fourth_root"] = "log"


class CrossEntropy(LocalObjective):
    """Mean cross-entropy over the batch."""

    name: ClassVar[str] = "cross_entropy"
    Options: ClassVar[type[ObjectiveOptions]] = AdjustedOptions
    options: AdjustedOptions

    def loss(self, batch: Batch, outputs: Outputs, context: LocalContext) -> Tensor:
        """Mean cross-entropy, a scalar."""
        return adjusted_cross_entropy(batch, outputs, context, self.options)


def adjusted_cross_entropy(
    batch: Batch, outputs: Outputs, context: LocalContext, options: AdjustedOptions
) -> Tensor:
    """Mean cross-entropy of the batch over calibrated logits, in float32: a scalar."""
    logits_NK = outputs.logits.float()
    if options.logit_adjustment:
        margins_K = class_margins(context.class_counts, options.calibration)
        logits_NK = logits_NK + options.logit_adjustment * margins_K
    return F.cross_entropy(logits_NK, batch.labels)


def class_margins(counts_K: Tensor, form: str) -> Tensor:
    """What each class's logit gets in training, [K]: the rarer the class at this site, the lower.

    "log": log(n_k / n), which leaves the softmax fit for balanced classes; "fourth_root": -n_k^(-1/4).
    """
    return log_prior(counts_K) if form == "log" else -counts_K.clamp_min(ABSENT_COUNT).pow(-0.25)
