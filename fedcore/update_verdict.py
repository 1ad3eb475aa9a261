"""What the gate found of an update, and how a round's updates were merged: in the journal and in a round's record."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict


class UpdateVerdict(BaseModel):
    """What the gate found of one update.

    `norm` is the Euclidean length of the update, from the model that the site started from; `median` that of the round's
    updates, `limit` the longest that is merged as it is. Of several kinds of tensors (`tensors`) they are those of the
    kind that came nearest to its limit. None: not measured, or nothing to hold it against.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    passed: bool
    # Why it did not pass; or why it was shortened, or its norm not judged.
    reason: str = ""
    # The share of its length that was merged, by kind of tensors, where it was too long to be merged as it is.
    kept: dict[str, float] = {}
    # "parameters", "statistics", or what the strategy adds: "aux/variate".
    tensors: str = ""
    norm: float | None = None
    median: float | None = None
    limit: float | None = None
    # Images that the site says it trained on, and that it registered with; None if it registered none.
    num_examples: int = 0
    registered: int | None = None

    @property
    def ratio(self) -> float | None:
        """`norm` over `median`."""
        return self.norm / self.median if self.norm is not None and self.median else None


class MergeFigures(BaseModel):
    """How the updates that passed became a model."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    rule: str = "mean"
    # How many bad updates the rule bore in this round, where that is a number of its: fewer than the plan asks for if
    # too few updates passed.
    tolerated: int | None = None
    # The share of each update in the model's parameters; empty where a rule has none (it takes coordinates, not updates).
    # What is missing to one is the model before, towards which `norm_clip` shortens.
    weights: dict[str, float] = {}


class FoldedUpdate(BaseModel):
    """An update of an earlier round that came late, and was folded into this round's aggregation if it passed the gate."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    # The round that it was trained in.
    round: int
    # The part of its weight that counted.
    share: float
    verdict: UpdateVerdict


def gate_summary(found: Mapping[str, Any]) -> str:
    """A round's verdicts in a few words: "6 of 8, up to 8.3×, 1 shortened" passed, in medians; "–" without verdicts."""
    verdicts = [UpdateVerdict.model_validate(verdict) for verdict in found.values()]
    passed = [verdict for verdict in verdicts if verdict.passed]
    ratios = [ratio for verdict in passed if (ratio := verdict.ratio) is not None]
    longest = f", up to {max(ratios):.1f}×" if ratios else ""
    shortened = sum(bool(verdict.kept) for verdict in passed)
    told = f", {shortened} shortened" if shortened else ""
    return f"{len(passed)} of {len(verdicts)}{longest}{told}" if verdicts else "–"
