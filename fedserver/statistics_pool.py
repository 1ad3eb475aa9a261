# ruff: noqa: N806 - shape suffixes
"""BatchNorm statistics that sites measured on a merged model, as one set of them in that model.

Legend: C channels.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedcore.errors import LearningError
from fedcore.models.state_file import save_state
from fedcore.norm_statistics import variance_partner
from fedcore.plan import Plan
from fedserver.aggregation import normalised
from fedserver.block_mergers import pooled_variance
from fedserver.strategies.base import SiteReport, Strategy
from fedserver.update_gate import LEAST_FOR_MEDIAN

State = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class RecalibratedModel:
    """The digest of the model with pooled statistics, and why sites' statistics are not in it."""

    digest: str
    rejected: Mapping[str, str] = field(default_factory=dict)


def recalibrate(
    model: State,
    measured: Sequence[tuple[SiteReport, State]],
    strategy: Strategy,
    plan: Plan,
    round_number: int,
    out: Path,
) -> RecalibratedModel:
    """Write the model with the sites' pooled statistics to `out`; every other tensor, `num_batches_tracked` included, stays.

    `measured` stand in site order, with the reports of the sites' updates: a site weighs what it weighs in the merge. The
    plan's gate holds statistics as it does those of updates. Raises LearningError if fewer than `min_sites` pass or a
    pooled number does not fit its dtype.
    """
    found = {report.site: tensors for report, tensors in measured}
    rejected = _far_off(model, found, plan, round_number)
    passed = [report for report, _ in measured if report.site not in rejected]
    if len(passed) < plan.min_sites:
        why = "; ".join(rejected.values())
        raise LearningError(f"{len(passed)} statistics passed the gate, min_sites is {plan.min_sites}: {why}")
    weights = normalised(strategy.weights(passed), round_number)
    merged = pooled([found[report.site] for report in passed], weights)
    for name, value in merged.items():
        if not bool(torch.isfinite(value).all()):
            raise LearningError(f"round {round_number}: tensor '{name}' overflows its dtype when pooled")
    return RecalibratedModel(save_state(out, {**model, **merged}), rejected)


def pooled(sites: Sequence[State], weights: Sequence[float]) -> dict[str, Tensor]:
    """Means [C] and variances [C] of the mixture of sites, float32: a variance holds the spread of the sites' means.

    `weights` sum to one. Sums follow the order given.
    """
    merged: dict[str, Tensor] = {}
    for name, like_C in sites[0].items():
        mean = variance_partner(name)
        if mean is None:
            total_C = torch.zeros_like(like_C, dtype=torch.float64)
            for site, weight in zip(sites, weights, strict=True):
                total_C.add_(site[name].double(), alpha=weight)
        else:
            total_C = pooled_variance(_pairs(sites, mean, name), weights)
        merged[name] = total_C.to(like_C.dtype)
    return merged


def _pairs(sites: Sequence[State], mean: str, variance: str) -> Callable[[], Iterator[tuple[Tensor, Tensor]]]:
    return lambda: ((site[mean], site[variance]) for site in sites)


def _far_off(model: State, found: Mapping[str, State], plan: Plan, round_number: int) -> dict[str, str]:
    """Why sites' statistics are too far from the merged ones, in medians of the round, to be pooled."""
    if not plan.gate.check_norm or len(found) < LEAST_FOR_MEDIAN:
        return {}
    distances = {site: _distance(model, tensors) for site, tensors in found.items()}
    median, factor = statistics.median(distances.values()), plan.gate.statistics_factor
    return {
        site: f"{site} round {round_number}: its statistics are {distance:.4g} from the merged ones, "
        f"{distance / median:.1f} times the round's median {median:.4g}, expected at most {factor:g} times"
        for site, distance in distances.items()
        if 0 < median * factor < distance
    }


def _distance(model: State, tensors: State) -> float:
    """Euclidean, over all statistics of a site."""
    return math.sqrt(
        sum(float((value.double() - model[name].double()).square().sum()) for name, value in tensors.items())
    )
