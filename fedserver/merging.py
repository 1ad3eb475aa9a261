"""A round's updates, and late ones of earlier rounds, through the gate and into a model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedcore.errors import EmptyRoundError, LearningError, StorageError, TensorMismatchError
from fedcore.models import learns_from_images
from fedcore.plan import Plan
from fedcore.update_verdict import FoldedUpdate, UpdateVerdict
from fedserver.aggregation import expected_update
from fedserver.decoding import open_update
from fedserver.late_updates import LateFile, late_share, rebase
from fedserver.strategies.base import MergeRequest, MergeResult, SiteReport, SiteUpdate, Strategy
from fedserver.tensor_source import TensorFile
from fedserver.update_gate import examine


@dataclass(frozen=True, slots=True)
class RoundMerge:
    """What came of it, by site. `merged` is None if too few updates passed, for the reason `reason`."""

    verdicts: Mapping[str, UpdateVerdict]
    folded: Mapping[str, FoldedUpdate] = field(default_factory=dict)
    merged: MergeResult | None = None
    reason: str = ""

    @property
    def rejected(self) -> dict[str, str]:
        """Why updates of this round did not pass, by site."""
        return {site: verdict.reason for site, verdict in self.verdicts.items() if not verdict.passed}


def merge_round(
    strategy: Strategy,
    request: MergeRequest,
    plan: Plan,
    registered: Mapping[str, int],
    late: Sequence[LateFile] = (),
) -> RoundMerge:
    """Examine the updates and merge those that pass, if `min_sites` of the plan are of this round.

    Late updates are examined and merged beside them. Raises LearningError, StorageError.
    """
    with _rebased(request, plan, late) as (rebased, broken):
        labels = {update.site for update in rebased}
        known = {**registered, **{found.label: found.registered_examples for found in late}}
        if not learns_from_images(plan.model.name):  # the count of examples says nothing
            known = {}
        verdicts = {
            **broken,
            **examine(replace(request, updates=[*request.updates, *rebased]), plan.gate, known, labels),
        }
        passed = _passed(request.updates, verdicts)
        merged, reason = None, ""
        if len(passed) < plan.min_sites:
            reason = f"only {len(passed)} updates passed the gate, min_sites is {plan.min_sites}"
        else:
            passed += _passed(rebased, verdicts)
            try:
                merged = strategy.merge(replace(request, updates=passed))
            except EmptyRoundError as error:  # a strategy with a gate of its own
                reason = error.message
    for site, why in merged.rejected.items() if merged is not None else ():
        verdicts[site] = verdicts[site].model_copy(update={"passed": False, "reason": why})
    folded = {
        found.site: FoldedUpdate(
            round=found.round,
            share=late_share(plan.limits.late_weight, request.round - found.round),
            verdict=verdicts.pop(found.label),
        )
        for found in late
    }
    if merged is None:
        refused = "; ".join(verdict.reason for verdict in verdicts.values() if not verdict.passed)
        return RoundMerge(verdicts, reason=f"{reason}: {refused}" if refused else reason)
    return RoundMerge(verdicts, folded, _of_this_round(merged, verdicts))


def _passed(updates: Sequence[SiteUpdate], verdicts: Mapping[str, UpdateVerdict]) -> list[SiteUpdate]:
    """The updates that are merged, with what of them is."""
    return [
        replace(update, kept=verdicts[update.site].kept) for update in updates if verdicts[update.site].passed
    ]


def _of_this_round(merged: MergeResult, verdicts: Mapping[str, UpdateVerdict]) -> MergeResult:
    """The result with the sites of this round alone as the accepted ones."""
    return replace(merged, accepted=tuple(site for site in merged.accepted if site in verdicts))


@contextmanager
def _rebased(
    request: MergeRequest, plan: Plan, late: Sequence[LateFile]
) -> Iterator[tuple[list[SiteUpdate], dict[str, UpdateVerdict]]]:
    """Late updates as if they had started from this round's model, in files that are gone in the end; and verdicts on
    those that can't be read.
    """
    model = TensorFile.open(request.model)
    expected = expected_update(request, model)
    updates: list[SiteUpdate] = []
    broken: dict[str, UpdateVerdict] = {}
    paths: list[Path] = []
    try:
        for number, found in enumerate(late):
            path = request.out.with_name(f"{request.out.name}.late-{number}")
            paths.append(path)
            try:
                start = TensorFile.open(found.started_from)
                update = open_update(found.path, expected, start, request.transfer, found.label)
                rebase(update, start, model, request.parameters, path)
            except (StorageError, TensorMismatchError, LearningError) as error:
                broken[found.label] = UpdateVerdict(
                    passed=False, reason=error.message, num_examples=found.report.num_examples
                )
                continue
            report = SiteReport(found.label, found.report.num_examples, found.report.num_steps)
            share = late_share(plan.limits.late_weight, request.round - found.round)
            updates.append(SiteUpdate(path, report, share, whole=True))
        yield updates, broken
    finally:
        for path in paths:
            path.unlink(missing_ok=True)
