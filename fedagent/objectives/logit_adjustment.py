"""Logit adjustment: a site's own class frequencies, added to the logits while it trains and left out after.

What a site has much of then needs less of a push, and what it lacks is not pushed down at all, so that the
model forgets it less. The counts stay at the site.

Sources: Menon et al. 2021, "Long-tail learning via logit adjustment", arXiv:2007.07314; Ren et al. 2020,
"Balanced Meta-Softmax", arXiv:2007.10740; Zhang et al. 2022, FedLC, arXiv:2209.00189.

Legend: N images in a batch, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Images that a class without any counts as: log(share) has to be finite.
SMOOTHING = 0.1


def log_prior(class_counts_K: Tensor, smoothing: float = SMOOTHING) -> Tensor:
    """Log of each class's share of a site's images [K], every class counting at least `smoothing` images."""
    counts_K = class_counts_K.float().clamp_min(smoothing)
    return (counts_K / counts_K.sum()).log()


def adjusted_logits(logits_NK: Tensor, class_counts_K: Tensor, tau: float) -> Tensor:
    """Logits [N, K] in float32 plus tau * log prior; tau = 0 leaves them, tau = 1 is balanced softmax."""
    if tau == 0:
        return logits_NK.float()
    return logits_NK.float() + tau * log_prior(class_counts_K)


def adjusted_cross_entropy(logits_NK: Tensor, labels_N: Tensor, class_counts_K: Tensor, tau: float) -> Tensor:
    """Mean cross-entropy of the adjusted logits, a scalar: for real images of the site alone."""
    return F.cross_entropy(adjusted_logits(logits_NK, class_counts_K, tau), labels_N)


def adjusted_where_real(
    logits_NK: Tensor, is_impression_N: Tensor, class_counts_K: Tensor, tau: float
) -> Tensor:
    """Logits [N, K] in float32, adjusted for real images only: impressions are not drawn by the site's shares."""
    if tau == 0:
        return logits_NK.float()
    adjusted_NK = adjusted_logits(logits_NK, class_counts_K, tau)
    return torch.where(is_impression_N[:, None], logits_NK.float(), adjusted_NK)
