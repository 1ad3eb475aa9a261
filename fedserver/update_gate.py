"""The gate before the merge: which updates are left out, and the numbers behind every verdict. Reads files, writes none.

An update is left out if its tensors are not the model's, hold NaN or Inf, or are of a length out of all proportion to the
others'; or if the site says that it trained on far more or fewer images than it registered with.
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
    medians = _medians([m.norms for m in measured if not m.reason and m.report.site not in late])
    return {
        found.report.site: _verdict(
            found, medians, gate, registered.get(found.report.site) or None, request.round
        )
        for found in measured
    }


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


def _verdict(
    found: _Measured,
    medians: Mapping[str, float],
    gate: GateSection,
    registered: int | None,
    round_number: int,
) -> UpdateVerdict:
    report, norms = found.report, found.norms

    def verdict(passed: bool, reason: str, kind: str = "", limit: float | None = None) -> UpdateVerdict:
        return UpdateVerdict(
            passed=passed, reason=reason, tensors=kind, norm=norms.get(kind), median=medians.get(kind), limit=limit,
            num_examples=report.num_examples, registered=registered,
        )  # fmt: skip

    if not norms:
        return verdict(False, found.reason)
    factors = {
        kind: gate.statistics_factor if kind == STATISTICS else gate.norm_factor
        for kind in sorted(norms, key=lambda kind: kind != PARAMETERS)
    }
    # Where nothing moved at most sites, there is no scale.
    limits = {
        kind: factors[kind] * median for kind, median in medians.items() if gate.check_norm and median > 0
    }
    nearest = max(factors, key=lambda kind: norms[kind] / limits[kind] if kind in limits else 0.0)
    limit = limits.get(nearest)
    if found.reason:
        return verdict(False, found.reason, nearest, limit)
    if limit is not None and norms[nearest] > limit:
        median = medians[nearest]
        reason = (
            f"{report.site} round {round_number}: {nearest} moved by {norms[nearest]:.4g}, "
            f"{norms[nearest] / median:.1f} times the round's median {median:.4g}, expected at most "
            f"{factors[nearest]:g} times; update discarded"
        )
        return verdict(False, reason, nearest, limit)
    why = ""
    if gate.check_norm and limit is None:
        few = f"fewer than {LEAST_FOR_MEDIAN} usable updates" if not medians else "most updates moved nothing"
        why = f"norm not judged: {few}"
    return verdict(True, why, nearest, limit)
