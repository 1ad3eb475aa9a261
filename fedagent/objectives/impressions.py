"""FedImpres' objective: real images, adjusted for what the site has, beside impressions of what it lacks.

A batch holds both. Real images have a cross-entropy, with logit adjustment if asked; impressions have any of a
cross-entropy on their labels, distillation of the soft targets and features that travel with them, and a
contrast that draws real images and impressions of a class together. Each term has a weight; a ramp over rounds
brings those of impressions in.

Source: Arya et al. 2024, "FedImpres: Federated Impressions", arXiv:2409.07351 (there one unweighted
cross-entropy with five impressions to an image). The terms' own sources stand in their modules.

Legend: N images in a batch of which the last M are impressions, C channels, H x W pixels, K classes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedagent.objectives.base import Batch, LocalContext, LocalObjective, ObjectiveOptions, Outputs
from fedagent.objectives.contrast import supervised_contrast
from fedagent.objectives.distillation import feature_loss, soft_target_loss
from fedagent.objectives.logit_adjustment import adjusted_where_real
from fedagent.objectives.sampling import Sampling, impression_weights
from fedcore.errors import LearningError
from fedcore.models.base import FederatedModel

BatchNormHandling = Literal["shared", "separate", "frozen_global"]


class ImpressionsOptions(ObjectiveOptions):
    """What a site does with impressions. Weights are relative to a real image's cross-entropy."""

    # Impressions to a real image in a batch, and which: by the bank's shares, or by what the site lacks.
    ratio: float = Field(1.0, ge=0, le=16)
    sampling: Sampling = "uniform"
    # "shared": one pass and one set of statistics; "separate": impressions have a pass of their own, whose
    # statistics are not kept; "frozen_global": once there are impressions, layers use the global model's
    # statistics and leave them (FixBN: Zhong et al. 2023, arXiv:2303.06530).
    batchnorm: BatchNormHandling = "shared"
    # Of real images: how many times log(share of the class) is added to the logits.
    logit_adjustment: float = Field(0.0, ge=0)
    # Cross-entropy on an impression's label, in the weighted mean over the mixed batch.
    impression_weight: float = Field(1.0, ge=0)
    # Added to it: distillation of soft targets, of features, supervised contrast over the whole batch.
    soft_weight: float = Field(0.0, ge=0)
    temperature: float = Field(2.0, gt=0)
    feature_weight: float = Field(0.0, ge=0)
    contrast_weight: float = Field(0.0, ge=0)
    contrast_temperature: float = Field(0.1, gt=0)
    # The weights above of impressions rise in equal steps over `ramp_rounds` rounds and are whole from round
    # ramp_from + ramp_rounds - 1 on; 0 rounds is no ramp.
    ramp_from: int = Field(1, ge=1)
    ramp_rounds: int = Field(0, ge=0)


class Impressions(LocalObjective):
    """Weighted mean of the cross-entropy over real images (weight 1) and impressions, plus what is asked.

    Without impressions, in the warm-up, this is the cross-entropy of real images.
    """

    name: ClassVar[str] = "impressions"
    Options: ClassVar[type[ObjectiveOptions]] = ImpressionsOptions
    mixes_impressions: ClassVar[bool] = True
    options: ImpressionsOptions

    @property
    def impression_ratio(self) -> float:
        """Impressions to a real image in a batch."""
        return self.options.ratio

    def impression_weights(self, labels_M: Tensor, context: LocalContext) -> Tensor | None:
        """How often each impression of the bank is drawn [M]; None means alike."""
        options = self.options
        return impression_weights(labels_M, context.class_counts, options.sampling, options.ratio)

    def outputs(self, batch: Batch, context: LocalContext) -> Outputs:
        """The model's answer, BatchNorm handled as the options say."""
        model = context.model
        assert isinstance(model, FederatedModel)
        if batch.num_impressions and self.options.batchnorm == "separate":
            num_real = len(batch.labels) - batch.num_impressions
            real_ND = model.features(batch.images[:num_real])
            with _statistics_unkept(model):
                features_ND = torch.cat([real_ND, model.features(batch.images[num_real:])])
        else:
            if batch.num_impressions and self.options.batchnorm == "frozen_global":
                for layer in _norm_layers(model):
                    layer.eval()
            features_ND = model.features(batch.images)
        return Outputs(features_ND, model.head(features_ND))

    def loss(self, batch: Batch, outputs: Outputs, context: LocalContext) -> Tensor:
        """The sum of the terms, a scalar. Raises LearningError if the bank lacks what a term needs."""
        options = self.options
        ramp = ramped(context.round, options.ramp_from, options.ramp_rounds)
        logits_NK = adjusted_where_real(
            outputs.logits, batch.is_impression, context.class_counts, options.logit_adjustment
        )
        loss = weighted_cross_entropy(
            logits_NK, batch.labels, batch.is_impression, ramp * options.impression_weight
        )
        if not batch.num_impressions:
            return loss
        num_real = len(batch.labels) - batch.num_impressions
        if options.soft_weight:
            targets_MK = _extra(batch, "soft_targets", context)
            distance = soft_target_loss(outputs.logits[num_real:], targets_MK, options.temperature)
            loss = loss + ramp * options.soft_weight * distance
        if options.feature_weight:
            targets_MD = _extra(batch, "features", context)
            loss = loss + ramp * options.feature_weight * feature_loss(
                outputs.features[num_real:], targets_MD
            )
        if options.contrast_weight:
            contrast = supervised_contrast(outputs.features, batch.labels, options.contrast_temperature)
            loss = loss + ramp * options.contrast_weight * contrast
        return loss


def weighted_cross_entropy(
    logits_NK: Tensor, labels_N: Tensor, is_impression_N: Tensor, impression_weight: float
) -> Tensor:
    """Mean cross-entropy in which impressions weigh `impression_weight` and other images 1: a scalar."""
    if impression_weight == 1:
        return F.cross_entropy(logits_NK.float(), labels_N)
    losses_N = F.cross_entropy(logits_NK.float(), labels_N, reduction="none")
    weights_N = (~is_impression_N).to(losses_N.dtype) + is_impression_N.to(losses_N.dtype) * impression_weight
    return (losses_N * weights_N).sum() / weights_N.sum()


def ramped(round_number: int, ramp_from: int, ramp_rounds: int) -> float:
    """Share of the full weight in a round, in [0, 1]: equal steps from round `ramp_from` on."""
    if ramp_rounds == 0:
        return 1.0
    return min(1.0, max(0.0, (round_number - ramp_from + 1) / ramp_rounds))


def _extra(batch: Batch, name: str, context: LocalContext) -> Tensor:
    found = batch.extras.get(name)
    if found is None:
        raise LearningError(
            f"{context.site} round {context.round}: the bank of impressions has no '{name}', it brings"
            f" {sorted(batch.extras) or 'nothing beside images and labels'}",
            hint="the coordinator's version is older than this site's; set that term's weight to 0",
        )
    return found


def _norm_layers(model: nn.Module) -> Iterator[_BatchNorm]:
    return (layer for layer in model.modules() if isinstance(layer, _BatchNorm))


@contextmanager
def _statistics_unkept(model: nn.Module) -> Iterator[None]:
    """Within: BatchNorm normalises by the batch at hand and leaves what it has stored as it is."""
    layers = [layer for layer in _norm_layers(model) if layer.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    held = [(layer.running_mean, layer.running_var) for layer in layers]
    for layer in layers:
        layer.running_mean = layer.running_var = None
    try:
        yield
    finally:
        for layer, (mean, variance) in zip(layers, held, strict=True):
            layer.running_mean, layer.running_var = mean, variance
            layer.track_running_stats = True
