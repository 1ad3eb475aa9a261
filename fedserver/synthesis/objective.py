"""What impressions minimise: small pure functions, each with its source.

Every term is a mean over images (or a function of means), so its gradient for one image shrinks as 1/B and
the balance between terms does not depend on the batch size. `loss.py` adds them up, each with its weight.

Legend: B images in a batch, C channels, H x W pixels, K classes, D features, L layers with BatchNorm.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# The side, in pixels, at which a slope is the difference of neighbouring pixels.
REFERENCE_SIDE = 28


def cross_entropy(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """How far the model is from seeing the labels: mean cross-entropy, a scalar.

    Source: Arya et al. 2024, arXiv:2409.07351.
    """
    return F.cross_entropy(logits_BK, labels_B)


def margin(logits_BK: Tensor, labels_B: Tensor, width: float) -> Tensor:
    """Mean of max(0, width - (logit of the label - largest other logit)), a scalar.

    Unlike cross-entropy it is at rest once every image is recognised with room to spare, and pushes no image
    towards the caricature that saturates the softmax. Source: Crammer & Singer 2001, "On the Algorithmic
    Implementation of Multiclass Kernel-based Vector Machines".
    """
    own_B1 = logits_BK.gather(1, labels_B[:, None])
    others_BK = logits_BK.scatter(1, labels_B[:, None], float("-inf"))
    return F.relu(width - (own_B1[:, 0] - others_BK.amax(dim=1))).mean()


def head_gradient(logits_BK: Tensor, features_BD: Tensor, labels_B: Tensor) -> Tensor:
    """Gradient [K, D] of the mean cross-entropy with respect to the head's weight:

    (softmax - onehot)^T f / B.
    """
    errors_BK = logits_BK.softmax(dim=1) - F.one_hot(labels_B, logits_BK.shape[1])
    return errors_BK.T @ features_BD / len(labels_B)


def stationarity_residual(gradient_KD: Tensor, weight_KD: Tensor, gamma: float) -> Tensor:
    """G + gamma W [K, D]:

    zero where the head, trained on these images with weight decay gamma, would rest.
    """
    return gradient_KD + gamma * weight_KD


def relative_residual(gradient_KD: Tensor, weight_KD: Tensor, gamma: float) -> Tensor:
    """(G + gamma W) / (||G|| + gamma ||W||) [K, D], the divisor taken as a constant.

    Its norm is at most 1, whatever the scale of features and weights, so that one penalty suits any model and
    any stage of training. Ours; the constraint is that of `stationarity_residual`.
    """
    scale = gradient_KD.detach().norm() + gamma * weight_KD.norm()
    relative_KD: Tensor = stationarity_residual(gradient_KD, weight_KD, gamma) / scale.clamp_min(1e-12)
    return relative_KD


def augmented_lagrangian(residual_KD: Tensor, dual_KD: Tensor, rho: float) -> Tensor:
    """rho/2 ||R||_F^2 + <Lambda, R>, a scalar: the constraint R = 0 on the way to being met.

    Source: Arya et al. 2024, arXiv:2409.07351; Boyd et al. 2011, ADMM.
    """
    return rho / 2 * residual_KD.square().sum() + (dual_KD * residual_KD).sum()


def updated_dual(dual_KD: Tensor, residual_KD: Tensor, rho: float) -> Tensor:
    """Lambda + rho R [K, D], with the residual over all images: the dual's ascent after a pass."""
    return dual_KD + rho * residual_KD


def total_variation(images_BCHW: Tensor) -> Tensor:
    """Mean squared slope, down and across: a scalar.

    The slope is the difference of neighbouring pixels per 1/28 of the image's side, so that one weight suits
    any size: a picture has the same slope at twice the resolution. Source: Mahendran & Vedaldi 2015,
    "Understanding Deep Image Representations by Inverting Them"; the unit is ours.
    """
    down = (images_BCHW[..., 1:, :] - images_BCHW[..., :-1, :]).square()
    across = (images_BCHW[..., :, 1:] - images_BCHW[..., :, :-1]).square()
    slopes = zip((down, across), images_BCHW.shape[2:], strict=True)
    means = (d.mean() * (side / REFERENCE_SIDE) ** 2 for d, side in slopes if d.numel())
    return sum(means, start=images_BCHW.new_zeros(()))


def mean_square(images_BCHW: Tensor) -> Tensor:
    """Mean squared normalised pixel, a scalar: L2 without a scale of its own."""
    return images_BCHW.square().mean()


def agreement(logits_BK: Tensor, other_BK: Tensor) -> Tensor:
    """1 - JS / ln 2 of two models' answers, a mean over images in [0, 1]; its minimum is disagreement.

    Images on which this round's and the last round's global model part show what training has just changed.
    Source: Yin et al. 2020, adaptive DeepInversion; there teacher and student, here two global models, so
    that no site's model is needed.
    """
    p_BK, q_BK = logits_BK.softmax(1), other_BK.softmax(1)
    log_mean_BK = ((p_BK + q_BK) / 2).clamp_min(1e-12).log()
    divergence_B = (
        (p_BK * (logits_BK.log_softmax(1) - log_mean_BK)).sum(1)
        + (q_BK * (other_BK.log_softmax(1) - log_mean_BK)).sum(1)
    ) / 2
    return 1 - divergence_B.mean() / torch.tensor(2.0).log().item()


def likeness_within_classes(features_BD: Tensor, labels_B: Tensor) -> Tensor:
    """Mean cosine of the features of two different images of one class, a scalar in [-1, 1].

    Its minimum is diversity within classes. Zero where no class has two images. Source: the pairwise form of
    the diversity terms of Yin et al. 2020 and Zhang et al. 2022 (DENSE, arXiv:2112.12371).
    """
    unit_BD = F.normalize(features_BD, dim=1)
    same_BB = (labels_B[:, None] == labels_B[None, :]).to(unit_BD.dtype).fill_diagonal_(0)
    return (unit_BD @ unit_BD.T * same_BB).sum() / same_BB.sum().clamp_min(1)


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """Mean and variance [C] of a BatchNorm layer's input over a batch, and as the layer has stored them."""

    mean: Tensor
    variance: Tensor
    stored_mean: Tensor
    stored_variance: Tensor
    epsilon: float


def statistics_distance(layers: Sequence[LayerStatistics], first_layer_weight: float = 1.0) -> Tensor:
    """Mean over channels and layers of (dm / s)^2 + (s_batch / s - 1)^2, a scalar without a unit.

    The first layer, nearest to the pixels, counts `first_layer_weight` times in the mean over layers. Source:
    Yin et al. 2020, "Dreaming to Distill" (DeepInversion), there not divided by the stored deviation s.
    """
    distances = []
    for layer in layers:
        stored_C = (layer.stored_variance + layer.epsilon).sqrt()
        deviation_C = (layer.variance + layer.epsilon).sqrt()
        shift_C = (layer.mean - layer.stored_mean) / stored_C
        distances.append((shift_C.square() + (deviation_C / stored_C - 1).square()).mean())
    total = first_layer_weight * distances[0] + sum(distances[1:], start=distances[0].new_zeros(()))
    return total / (first_layer_weight + len(distances) - 1)
