"""Norm clipping: an update longer than a limit is shortened to it, so that none pulls harder than the others.

Source: Sun et al. 2019, "Can You Really Backdoor Federated Learning?", arXiv:1911.07963, section 4 (norm thresholding).
Different from it: the limit is a multiple of the round's median length instead of a constant, which would have to be
found anew for every model and learning rate.
"""

import statistics
from collections.abc import Sequence


def clip_factors(norms: Sequence[float], clip_factor: float) -> list[float]:
    """What to multiply each update by: min(1, limit / norm), the limit being `clip_factor` times the median norm.

    Where the median is zero there is no scale, and nothing is clipped.
    """
    limit = clip_factor * statistics.median(norms)
    if limit == 0:
        return [1.0] * len(norms)
    return [1.0 if norm <= limit else limit / norm for norm in norms]
