"""A round's updates through the gate and into a model."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedcore.errors import EmptyRoundError
from fedcore.plan import Plan
from fedcore.update_verdict import UpdateVerdict
from fedserver.strategies.base import MergeRequest, MergeResult, Strategy
from fedserver.update_gate import examine


@dataclass(frozen=True, slots=True)
class RoundMerge:
    """What came of it. `merged` is None if too few updates passed, for the reason `reason`."""

    verdicts: Mapping[str, UpdateVerdict]
    merged: MergeResult | None
    reason: str = ""

    @property
    def rejected(self) -> dict[str, str]:
        """Why updates did not pass, by site."""
        return {site: verdict.reason for site, verdict in self.verdicts.items() if not verdict.passed}


def merge_round(
    strategy: Strategy, request: MergeRequest, plan: Plan, registered: Mapping[str, int]
) -> RoundMerge:
    """Examine the updates and merge those that pass, if they are `min_sites` of the plan.

    Raises LearningError, StorageError.
    """
    verdicts = examine(request, plan.gate, registered)
    passed = [update for update in request.updates if verdicts[update.site].passed]
    if len(passed) < plan.min_sites:
        few = f"only {len(passed)} updates passed the gate, min_sites is {plan.min_sites}"
        why = "; ".join(verdict.reason for verdict in verdicts.values() if not verdict.passed)
        return RoundMerge(verdicts, None, f"{few}: {why}")
    try:
        merged = strategy.merge(replace(request, updates=passed))
    except EmptyRoundError as error:  # a strategy with a gate of its own
        return RoundMerge(verdicts, None, error.message)
    for site, reason in merged.rejected.items():
        verdicts[site] = verdicts[site].model_copy(update={"passed": False, "reason": reason})
    return RoundMerge(verdicts, merged)
