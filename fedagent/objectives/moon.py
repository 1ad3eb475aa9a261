"""MOON's objective: features are drawn to the global model's and away from the site's own of the last round.

Different from the paper: the model's own features take the place of a projection head's, so that every
architecture can be used as it is. A site's last model stays at the site; while it has none, in its first round,
this is plain cross-entropy.

Source: Li et al. 2021, "Model-Contrastive Federated Learning", arXiv:2103.16257, equation 3 and Algorithm 1.

Legend: N images in a batch, D features.
"""

import copy
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
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
from fedcore.models.base import FederatedModel


class MoonOptions(AdjustedOptions):
    """`mu` weighs the contrast, `temperature` divides the cosine similarities."""

    mu: float = Field(1.0, ge=0)
    temperature: float = Field(0.5, gt=0)


class ModelContrast(LocalObjective):
    """Mean cross-entropy + mu * model contrast."""

    name: ClassVar[str] = "moon"
    Options: ClassVar[type[ObjectiveOptions]] = MoonOptions
    options: MoonOptions
    _previous: FederatedModel | None = None

    def begin(self, context: LocalContext) -> None:
        """Build the site's model of the last round that it took part in."""
        self._previous = None
        if context.kept and self.options.mu:
            previous = copy.deepcopy(context.global_model)
            previous.load_state_dict(dict(context.kept))
            assert isinstance(previous, FederatedModel)
            self._previous = previous

    def loss(self, batch: Batch, outputs: Outputs, context: LocalContext) -> Tensor:
        """Cross-entropy plus the contrast, a scalar."""
        loss = adjusted_cross_entropy(batch, outputs, context, self.options)
        if self._previous is None:
            return loss
        global_model = context.global_model
        assert isinstance(global_model, FederatedModel)
        with torch.no_grad():
            global_ND = global_model.features(batch.images)
            previous_ND = self._previous.features(batch.images)
        contrast = model_contrast(
            outputs.features, global_ND, previous_ND, temperature=self.options.temperature
        )
        return loss + self.options.mu * contrast

    def end(self, context: LocalContext, num_steps: int) -> Ending:
        """The trained model stays, for the next round."""
        return Ending(kept=dict(context.model.state_dict()) if self.options.mu else {})


def model_contrast(
    features_ND: Tensor, global_ND: Tensor, previous_ND: Tensor, *, temperature: float
) -> Tensor:
    """Mean of -log(e^(s_global/t) / (e^(s_global/t) + e^(s_previous/t))), s cosine similarities: a scalar."""
    to_global_N = F.cosine_similarity(features_ND.float(), global_ND.float())
    to_previous_N = F.cosine_similarity(features_ND.float(), previous_ND.float())
    return F.softplus((to_previous_N - to_global_N) / temperature).mean()
