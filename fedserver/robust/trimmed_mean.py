"""Coordinate-wise trimmed mean: so many sites as are trimmed at each end can't move a coordinate beyond the others' values.

Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", arXiv:1803.01498,
Algorithm 1, option II, with a number of sites in the place of the fraction beta, taken of models instead of gradients.

Legend: S sites, E elements.
"""

import torch
from torch import Tensor

from fedserver.robust.sorting import sorted_rows


def trimmed_count(sites: int, tolerate: int) -> int:
    """How many values to leave out at each end: `tolerate`, but so few that one is left."""
    return min(tolerate, (sites - 1) // 2)


def trimmed_mean(values_SE: Tensor, tolerate: int) -> Tensor:
    """The mean [E] over sites of each element, float64, without its `tolerate` smallest and largest values."""
    trim = trimmed_count(len(values_SE), tolerate)
    kept = sorted_rows(values_SE)[trim : len(values_SE) - trim]
    total = torch.zeros(values_SE.shape[1], dtype=torch.float64)
    for row in kept:
        total += row
    return total / len(kept)


def largest_kept_integer(values_SE: Tensor, tolerate: int) -> Tensor:
    """The largest [E] of the integers that are not trimmed: what the mean's maximum is among the sites it believes."""
    trim = trimmed_count(len(values_SE), tolerate)
    return sorted_rows(values_SE)[len(values_SE) - 1 - trim]
