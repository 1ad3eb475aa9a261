"""Multi-Krum: the updates that lie nearest to their neighbours are averaged, the others left out.

A bad update that is to be chosen must lie among the honest ones, and then it does little harm.

Source: Blanchard et al. 2017, "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent",
arXiv:1703.02757, section 4, with m = n - f chosen of n updates as in its experiments; El Mhamdi et al. 2018,
arXiv:1802.07927, for the name f of the bad ones.

Legend: S sites.
"""

import torch
from torch import Tensor


def bearable(sites: int, tolerate: int) -> int:
    """How many bad updates of so many the rule bears: n >= 2 f + 3, and f is at most `tolerate`."""
    return max(0, min(tolerate, (sites - 3) // 2))


def krum_scores(squared_distances_SS: Tensor, tolerate: int) -> Tensor:
    """The score [S] of each update: the sum of its squared distances to its n - f - 2 nearest others (at least one)."""
    sites = len(squared_distances_SS)
    others = squared_distances_SS + torch.diag(torch.full((sites,), torch.inf, dtype=torch.float64))
    nearest = min(max(1, sites - tolerate - 2), sites - 1)
    return torch.sort(others, dim=1).values[:, :nearest].sum(dim=1)


def chosen(squared_distances_SS: Tensor, tolerate: int) -> list[int]:
    """Which updates to average, in ascending order: the n - f with the smallest scores, the earlier of equals."""
    sites = len(squared_distances_SS)
    scores = krum_scores(squared_distances_SS, tolerate)
    order = torch.sort(scores, stable=True).indices.tolist()
    return sorted(order[: sites - tolerate])
