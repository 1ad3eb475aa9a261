"""From the plan's `[aggregation]` to the merger of a round's updates."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from fedcore.plan_robustness import (
    AggregationSection,
    MeanRule,
    MedianRule,
    MultiKrumRule,
    NormClipRule,
    TrimmedMeanRule,
)
from fedcore.tensor_file import EXTRA_PREFIX
from fedserver.block_mergers import BlockMerger, CoordinateMerger, Summands, SumMerger
from fedserver.robust.median import coordinate_median, middle_integer
from fedserver.robust.multi_krum import bearable, chosen
from fedserver.robust.norm_clip import clip_factors
from fedserver.robust.norms import PARAMETERS, kind_of, squared_distances, update_norms
from fedserver.robust.trimmed_mean import largest_kept_integer, trimmed_count, trimmed_mean
from fedserver.tensor_source import TensorSource


@dataclass(frozen=True, slots=True)
class RuleInUse:
    """A rule set up for a round's updates.

    `shares` are the updates' shares in the parameters, in their order; empty for rules of coordinates. `tolerated` is how
    many bad updates the rule bears, where it has such a number.
    """

    merger: BlockMerger
    shares: Sequence[float] = field(default_factory=tuple)
    tolerated: int | None = None


def set_up_rule(
    rule: AggregationSection,
    model: TensorSource,
    files: Sequence[TensorSource],
    weights: Sequence[float],
    parameters: Collection[str],
) -> RuleInUse:
    """The merger of these updates; `weights` are the strategy's and sum to one.

    Rules of coordinates count every site the same: a weight is something that a bad site says of itself.
    """
    match rule:
        case MeanRule():
            return RuleInUse(SumMerger(lambda name: Summands(files, weights)), weights)
        case MedianRule():
            return RuleInUse(CoordinateMerger(files, coordinate_median, middle_integer))
        case TrimmedMeanRule(tolerate=tolerate):
            merger = CoordinateMerger(
                files,
                partial(trimmed_mean, tolerate=tolerate),
                partial(largest_kept_integer, tolerate=tolerate),
            )
            return RuleInUse(merger, tolerated=trimmed_count(len(files), tolerate))
        case MultiKrumRule():
            return _multi_krum(rule, files, weights, parameters)
        case NormClipRule():
            return _norm_clip(rule, model, files, weights, parameters)


def _multi_krum(
    rule: MultiKrumRule, files: Sequence[TensorSource], weights: Sequence[float], parameters: Collection[str]
) -> RuleInUse:
    tolerated = bearable(len(files), rule.tolerate)
    kept = set(chosen(squared_distances(files, parameters), tolerated))
    total = sum(weights[i] for i in kept)
    # Where the strategy gives all the chosen ones no weight, they count the same.
    shares = [
        (weights[i] / total if total > 0 else 1 / len(kept)) if i in kept else 0.0 for i in range(len(files))
    ]
    summands = Summands([files[i] for i in sorted(kept)], [shares[i] for i in sorted(kept)])
    return RuleInUse(SumMerger(lambda name: summands), shares, tolerated)


def _norm_clip(
    rule: NormClipRule,
    model: TensorSource,
    files: Sequence[TensorSource],
    weights: Sequence[float],
    parameters: Collection[str],
) -> RuleInUse:
    """An update that is shortened to the factor s is the model x (1 - s) and the site's x s: so it is summed, in one pass.

    Statistics are pooled with the same shares. What has no counterpart in the model is shortened towards zero.
    """
    norms = [update_norms(model, file, parameters) for file in files]
    by_kind: dict[str, Summands] = {}
    for kind in norms[0]:
        factors = clip_factors([norm[kind] for norm in norms], rule.clip_factor)
        shares = [weight * factor for weight, factor in zip(weights, factors, strict=True)]
        if kind.startswith(EXTRA_PREFIX) or all(factor == 1 for factor in factors):
            by_kind[kind] = Summands(files, shares)
        else:
            by_kind[kind] = Summands([model, *files], [1 - sum(shares), *shares])
    unclipped = Summands(files, weights)

    def summands(name: str) -> Summands:
        return by_kind.get(kind_of(name, parameters), unclipped)

    clipped = by_kind.get(PARAMETERS, unclipped)
    return RuleInUse(SumMerger(summands), clipped.weights[-len(files) :])


def named_shares(sites: Sequence[str], rule: RuleInUse) -> Mapping[str, float]:
    """The rule's shares by site; empty for rules of coordinates."""
    return dict(zip(sites, rule.shares, strict=True)) if rule.shares else {}
