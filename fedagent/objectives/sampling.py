"""Which impressions a site should see: shares of the classes, from its own counts, which stay at the site.

Legend: K classes, M impressions in the bank.
"""

from typing import Literal

import torch
from torch import Tensor

Sampling = Literal["uniform", "lack"]


def lack(class_counts_K: Tensor, ratio: float) -> Tensor:
    """Shares [K] of the classes among impressions, so that they and the real images are as even as can be.

    With `ratio` impressions to a real image, of which class k has the share p_k, the shares q minimise the
    largest class of p + ratio * q: water is poured over p until it holds `ratio` (q_k = max(0, level - p_k) /
    ratio). What a site has most of it is not sent again.
    """
    shares_K = class_counts_K.double().cpu()
    shares_K = shares_K / shares_K.sum().clamp_min(1e-12)
    ordered_K = shares_K.sort().values
    # The level if the k lowest classes are under water.
    count_K = torch.arange(1, len(ordered_K) + 1, dtype=torch.float64)
    levels_K = (ratio + ordered_K.cumsum(0)) / count_K
    level = levels_K[(levels_K > ordered_K).nonzero()[-1, 0]]
    poured_K = (level - shares_K).clamp_min(0)
    return poured_K / poured_K.sum()


def impression_weights(
    labels_M: Tensor, class_counts_K: Tensor, sampling: Sampling, ratio: float
) -> Tensor | None:
    """How often each impression of the bank is drawn [M], relative to the others; None means alike.

    A class's share is split evenly among its impressions. Classes without impressions are left out; where only
    those are lacking, all are drawn alike.
    """
    if sampling == "uniform":
        return None
    labels_M = labels_M.cpu()
    per_class_K = torch.bincount(labels_M, minlength=len(class_counts_K)).double()
    weights_M = (lack(class_counts_K, ratio) / per_class_K.clamp_min(1))[labels_M]
    return weights_M if float(weights_M.sum()) > 0 else None
