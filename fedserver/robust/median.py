"""Coordinate-wise median: up to half of the sites, short of one, can't move a coordinate beyond the others' values.

Source: Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", arXiv:1803.01498,
Algorithm 1, option I, taken of models instead of gradients.

Legend: S sites, E elements.
"""

from torch import Tensor

from fedserver.robust.sorting import sorted_rows


def coordinate_median(values_SE: Tensor) -> Tensor:
    """The median [E] over sites of each element, float64; of an even number, the mean of the two in the middle."""
    rows = sorted_rows(values_SE)
    lower, upper = rows[(len(rows) - 1) // 2], rows[len(rows) // 2]
    return (lower.double() + upper.double()) / 2


def middle_integer(values_SE: Tensor) -> Tensor:
    """The median [E] of integers, the lower of two in the middle: a value that some site sent."""
    return sorted_rows(values_SE)[(len(values_SE) - 1) // 2]
