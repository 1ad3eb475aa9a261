"""Distillation of what impressions carry: the global model's answers and features, from when they were made.

Legend: M impressions in a batch, K classes, D features.
"""

import torch.nn.functional as F
from torch import Tensor


def soft_target_loss(logits_MK: Tensor, log_targets_MK: Tensor, temperature: float) -> Tensor:
    """T^2 KL(target_T || softmax(logits / T)), mean over impressions: a scalar, zero where they agree.

    `log_targets_MK` are log-probabilities at temperature 1. Source: Hinton et al. 2015, "Distilling the
    Knowledge in a Neural Network", arXiv:1503.02531.
    """
    targets_MK = (log_targets_MK.float() / temperature).log_softmax(1)
    answers_MK = (logits_MK.float() / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(answers_MK, targets_MK, reduction="batchmean", log_target=True)


def feature_loss(features_MD: Tensor, targets_MD: Tensor) -> Tensor:
    """||f - t||^2 / mean ||t||^2, mean over impressions: a scalar without a unit.

    Source: Romero et al. 2015, FitNets, arXiv:1412.6550; relative to the targets' size, so that one weight
    suits any model. Smith et al. 2021, "Always Be Dreaming", arXiv:2106.09701, distils inverted images' features
    for the same end.
    """
    targets_MD = targets_MD.float()
    scale = targets_MD.square().sum(1).mean().clamp_min(1e-12)
    return (features_MD.float() - targets_MD).square().sum(1).mean() / scale
