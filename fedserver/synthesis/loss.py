"""The synthesis objective: a sum of named terms, each with its own weight. Terms of weight 0 cost nothing.

Legend: B images in a batch, C channels, H x W pixels, K classes, D features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedserver.synthesis import objective
from fedserver.synthesis.objective import LayerStatistics
from fedserver.synthesis.options import SynthesisOptions

# Weight of BatchNorm's statistics where the plan leaves it open and the model has them.
BATCH_NORM = 0.1


@dataclass(frozen=True, slots=True)
class View:
    """One forward pass over a batch: what terms look at."""

    images: Tensor
    labels: Tensor
    features: Tensor
    logits: Tensor
    # Logits of the last round's global model on the same images; None where there is none.
    last_logits: Tensor | None
    layers: Sequence[LayerStatistics]


def terms(view: View, head: nn.Linear, dual_KD: Tensor, options: SynthesisOptions) -> dict[str, Tensor]:
    """The weighted terms by name, scalars; those of weight 0, or without what they need, are left out."""
    found: dict[str, Tensor] = {}
    if options.fit_weight:
        found[options.fit] = options.fit_weight * (
            objective.margin(view.logits, view.labels, options.margin)
            if options.fit == "margin"
            else objective.cross_entropy(view.logits, view.labels)
        )
    if options.stationarity:
        gradient_KD = objective.head_gradient(view.logits, view.features, view.labels)
        residual_KD = residual(gradient_KD, head.weight, options)
        lagrangian = objective.augmented_lagrangian(residual_KD, dual_KD, options.rho)
        found["stationarity"] = options.stationarity * lagrangian
    if view.layers:
        weight = BATCH_NORM if options.batch_norm is None else options.batch_norm
        distance = objective.statistics_distance(view.layers, options.first_layer_weight)
        found["batch_norm"] = weight * distance
    if options.total_variation:
        found["total_variation"] = options.total_variation * objective.total_variation(view.images)
    if options.l2:
        found["l2"] = options.l2 * objective.mean_square(view.images)
    if options.disagreement and view.last_logits is not None:
        found["disagreement"] = options.disagreement * objective.agreement(view.logits, view.last_logits)
    if options.diversity:
        likeness = objective.likeness_within_classes(view.features, view.labels)
        found["diversity"] = options.diversity * likeness
    return found


def residual(gradient_KD: Tensor, weight_KD: Tensor, options: SynthesisOptions) -> Tensor:
    """The stationarity residual [K, D] in the scale that the options ask for."""
    if options.stationarity_scale == "published":
        return objective.stationarity_residual(gradient_KD, weight_KD, options.gamma)
    return objective.relative_residual(gradient_KD, weight_KD, options.gamma)


def total(found: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """The sum of terms, a scalar; zero, still differentiable, without any."""
    if not found:
        return like.sum() * 0
    return torch.stack(list(found.values())).sum()
