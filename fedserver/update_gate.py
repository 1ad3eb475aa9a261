"""The gate before the merge: which updates are shortened or left out, and the numbers behind every verdict. Reads files,
writes none.

An update is left out if its tensors are not the model's, hold NaN or Inf, or are of a length out of all proportion to the
others'; or if the site says that it trained on far more or fewer images than it registered with. One that is too long, but
not out of all proportion, is to be shortened to the longest that is not: where sites differ much, most of them may hardly
move, and the one that moves far is the one that has what the others lack.
"""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from fedcore.errors import LearningError, StorageError, TensorMismatchError
from fedcore.plan_robustness import GateSection
from fedcore.tensor_file import TensorManifest
from fedcore.update_verdict import UpdateVerdict
from fedserver.aggregation import expected_update, open_checked
from fedserver.robust.norms import PARAMETERS, STATISTICS, update_norms
from fedserver.strategies.base import MergeRequest, SiteReport, SiteUpdate
from fedserver.tensor_blocks import first_not_finite
from fedserver.tensor_source import TensorFile

# Fewer updates than this have no median that says which of them is the odd one.
LEAST_FOR_MEDIAN = 3


@dataclass(frozen=True, slots=True)
class _Measured:
    """An update as far as it was judged by itself: the reason against it, or its lengths by kind of tensors."""

    report: SiteReport
    reason: str
    norms: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Bounds:
    """What the lengths of one kind of tensors are held against in a round."""

    median: float
    # Longer ones are shortened to `longest`, beyond `refused` left out.
    limit: float
    refused: float
    longest: float


def examine(
    request: MergeRequest, gate: GateSection, registered: Mapping[str, int], late: Collection[str] = ()
) -> dict[str, UpdateVerdict]:
    """A verdict on every update of the request, by site. `registered` are images that sites registered with; a site that
    is not in it, or registered none, is not held to a number. The medians are those of updates that are not `late`.

    Every update is read once. Raises StorageError if the global model is damaged.
    """
    model = TensorFile.open(request.model)
    expected = expected_update(request, model)
    measured = [
        _measured(request, update, model, expected, _examples_reason(update.report, gate, registered))
        for update in request.updates
    ]
    usable = [m.norms for m in measured if not m.reason and m.report.site not in late]
    medians = _medians(usable)
    bounds = {
        kind: _bounds(kind, median, [norms[kind] for norms in usable], gate)
        for kind, median in medians.items()
        if gate.check_norm and median > 0  # where nothing moved at most sites, there is no scale
    }
    few = f"fewer than {LEAST_FOR_MEDIAN} usable updates" if not medians else "most updates moved nothing"
    unjudged = f"norm not judged: {few}" if gate.check_norm else ""
    verdicts = {}
    for found in measured:
        verdict = _verdict(found, bounds, unjudged, request.round)
        figures = {
            "norm": found.norms.get(verdict.tensors),
            "median": medians.get(verdict.tensors),
            "num_examples": found.report.num_examples,
            "registered": registered.get(found.report.site) or None,
        }
        verdicts[found.report.site] = verdict.model_copy(update=figures)
    return verdicts


def _measured(
    request: MergeRequest,
    update: SiteUpdate,
    model: TensorFile,
    expected: TensorManifest,
    examples_reason: str,
) -> _Measured:
    who = f"{update.site} round {request.round}"
    try:
        file = open_checked(update, expected, model, request)
        norms = update_norms(model, file, request.parameters)
    except (TensorMismatchError, StorageError, LearningError) as error:
        return _Measured(update.report, error.message, {})
    if not all(math.isfinite(norm) for norm in norms.values()):
        name = first_not_finite(file)
        reason = f"tensor '{name}' holds NaN or Inf" if name else "its distance from the model overflows"
        return _Measured(update.report, f"{who}: {reason}; update discarded", {})
    return _Measured(
        update.report, f"{who}: {examples_reason}; update discarded" if examples_reason else "", norms
    )


def _examples_reason(report: SiteReport, gate: GateSection, registered_by: Mapping[str, int]) -> str:
    registered = registered_by.get(report.site, 0)
    if not gate.check_examples or registered <= 0:
        return ""
    most, least = registered * (1 + gate.examples_tolerance), registered / (1 + gate.examples_tolerance)
    if least <= report.num_examples <= most:
        return ""
    return (
        f"says that it trained on {report.num_examples} images, registered with {registered}, expected {math.ceil(least)} "
        f"to {math.floor(most)} (if its images changed, restart the agent, or raise gate.examples_tolerance)"
    )


def _medians(norms: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median length by kind; empty if there are too few updates."""
    if len(norms) < LEAST_FOR_MEDIAN:
        return {}
    return {kind: statistics.median(found[kind] for found in norms) for kind in norms[0]}


def _bounds(kind: str, median: float, lengths: Sequence[float], gate: GateSection) -> _Bounds:
    if kind == STATISTICS:  # measurements: there is nothing to shorten
        limit = refused = gate.statistics_factor * median
    else:
        limit = gate.norm_factor * median
        refused = max(gate.refuse_factor * median, limit)
    return _Bounds(median, limit, refused, longest=max(length for length in lengths if length <= limit))


def _verdict(
    found: _Measured, bounds: Mapping[str, _Bounds], unjudged: str, round_number: int
) -> UpdateVerdict:
    """What is to be done with the update, why, and the kind of tensors that decides it."""
    norms = found.norms
    if not norms:
        return UpdateVerdict(passed=False, reason=found.reason)
    # Parameters first, where several are as near to their bounds.
    kinds = sorted(norms, key=lambda kind: kind != PARAMETERS)
    nearest = max(kinds, key=lambda kind: norms[kind] / bounds[kind].limit if kind in bounds else 0.0)
    limit = bounds[nearest].limit if nearest in bounds else None

    def moved(kind: str, most: float) -> str:
        median = bounds[kind].median
        return (
            f"{found.report.site} round {round_number}: {kind} moved by {norms[kind]:.4g}, {norms[kind] / median:.1f} times "
            f"the round's median {median:.4g}, expected at most {most / median:g} times"
        )

    if found.reason:
        return UpdateVerdict(passed=False, reason=found.reason, tensors=nearest, limit=limit)
    for kind in kinds:
        if kind in bounds and norms[kind] > bounds[kind].refused:
            reason = f"{moved(kind, bounds[kind].refused)}; update discarded"
            return UpdateVerdict(passed=False, reason=reason, tensors=kind, limit=bounds[kind].limit)
    kept = {kind: bounds[kind].longest / norms[kind] for kind in bounds if norms[kind] > bounds[kind].limit}
    if kept:
        reason = f"{moved(nearest, bounds[nearest].limit)}; shortened to {bounds[nearest].longest:.4g}"
    else:
        reason = unjudged if limit is None else ""
    return UpdateVerdict(passed=True, reason=reason, tensors=nearest, limit=limit, kept=kept)
