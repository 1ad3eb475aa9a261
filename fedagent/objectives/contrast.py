"""Supervised contrast: real images and impressions of one class are drawn together, of two classes apart.

Sources: Khosla et al. 2020, "Supervised Contrastive Learning", arXiv:2004.11362, equation 2; for aligning real
with virtual images: Tang et al. 2022, VHL, arXiv:2206.02465.

Legend: N images in a batch, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def supervised_contrast(features_ND: Tensor, labels_N: Tensor, temperature: float) -> Tensor:
    """Mean over images that have a partner of -mean over partners of log softmax(cosine / temperature).

    Partners are the other images of the same class. A scalar; zero, still differentiable, where no class comes
    twice.
    """
    unit_ND = F.normalize(features_ND.float(), dim=1)
    likeness_NN = unit_ND @ unit_ND.T / temperature
    own_NN = torch.eye(len(labels_N), dtype=torch.bool, device=labels_N.device)
    log_share_NN = likeness_NN.masked_fill(own_NN, float("-inf")).log_softmax(1).masked_fill(own_NN, 0.0)
    partners_NN = ((labels_N[:, None] == labels_N[None, :]) & ~own_NN).float()
    count_N = partners_NN.sum(1)
    losses_N = -(log_share_NN * partners_NN).sum(1) / count_N.clamp_min(1)
    return losses_N.sum() / (count_N > 0).sum().clamp_min(1)
