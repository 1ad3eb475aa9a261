"""The state of a run: frozen values, changed only by `round_machine.apply`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TypeVar

from fedcore.plan import Plan
from fedcore.round_record import RoundRecord
from fedcore.update_verdict import MergeFigures, UpdateVerdict
from fedserver.round_events import Metrics, Report, UpdatesScored

K = TypeVar("K")
V = TypeVar("V")


class Status(StrEnum):
    """What an operator reads as the run's state. The last four are final."""

    QUEUED = "QUEUED"
    WAITING = "WAITING"
    RUNNING = "RUNNING"
    PAUSED = "PAUSED"
    DONE = "DONE"
    DEGRADED = "DEGRADED"
    FAILED = "FAILED"
    ABORTED = "ABORTED"

    @property
    def final(self) -> bool:
        """Whether the run is over for good."""
        return self in (Status.DONE, Status.DEGRADED, Status.FAILED, Status.ABORTED)


class Stage(StrEnum):
    """What a run that left the queue is doing."""

    INITIALISING = "initialising"
    OPENING = "waiting"
    TRAINING = "training"
    AGGREGATING = "aggregating"
    EVALUATING = "evaluating"
    PAUSED = "paused"
    OVER = "over"


@dataclass(frozen=True, slots=True)
class Update:
    """A durable update: its artifact, its size, what the site said of it."""

    digest: str
    payload_bytes: int
    report: Report


@dataclass(frozen=True, slots=True)
class Round:
    """The round under way.

    Invariants: started, reported and let_go hold only registered sites; reported and let_go are disjoint; accepted and
    rejected hold only reported sites; `model` and `released` are set exactly from the aggregation on.
    """

    number: int
    attempt: int
    expected: tuple[str, ...]
    registered: tuple[str, ...]
    opened_at: float
    absent: Mapping[str, str] = field(default_factory=dict)
    registered_examples: Mapping[str, int] = field(default_factory=dict)
    started: frozenset[str] = frozenset()
    reported: Mapping[str, Update] = field(default_factory=dict)
    let_go: Mapping[str, str] = field(default_factory=dict)
    closed_at: float | None = None
    # What the next round starts from, and what is evaluated, synthesised through and handed out: the same artifact
    # unless the strategy averages models over rounds.
    model: str | None = None
    released: str | None = None
    # What the strategy keeps from this round on.
    strategy_state: str | None = None
    aggregated_at: float | None = None
    accepted: tuple[str, ...] = ()
    rejected: Mapping[str, str] = field(default_factory=dict)
    # What the gate found, those of attempts that failed included, and how the updates were merged.
    verdicts: Mapping[str, UpdateVerdict] = field(default_factory=dict)
    merge: MergeFigures | None = None
    evaluations: Mapping[str, tuple[Metrics, ...]] = field(default_factory=dict)
    not_evaluated: Mapping[str, str] = field(default_factory=dict)
    # What local training did to each class, where the plan asks for it.
    scores: UpdatesScored | None = None
    evaluated_at: float | None = None
    # None while synthesis is to be done; made = 0 with a note when there is none.
    synthesised: tuple[int, str] | None = None
    synthesised_at: float | None = None
    new_impressions: str | None = None
    synthesis_figures: Mapping[str, float] = field(default_factory=dict)

    @property
    def outstanding(self) -> tuple[str, ...]:
        """Registered sites whose update is still expected."""
        return tuple(s for s in self.registered if s not in self.reported and s not in self.let_go)

    @property
    def unevaluated(self) -> tuple[str, ...]:
        """Sites whose figures are still expected: all that the model was made of."""
        return tuple(s for s in self.accepted if s not in self.evaluations and s not in self.not_evaluated)


@dataclass(frozen=True, slots=True)
class Confirmation:
    """A site has done its part of a purge. `at` is seconds since the epoch, `audit_head` SEQUENCE:DIGEST of its log."""

    at: float
    deleted: tuple[str, ...]
    audit_head: str


@dataclass(frozen=True, slots=True)
class Purge:
    """Banks that were removed: here when the purge is journalled, at each of `sites` when it has confirmed.

    `rounds` made them. Invariant: confirmed holds only `sites`. `at` is seconds since the epoch.
    """

    id: str
    at: float
    by: str
    reason: str
    rounds: tuple[int, ...]
    digests: tuple[str, ...]
    sites: tuple[str, ...]
    confirmed: Mapping[str, Confirmation] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RunState:
    """A run. `finished` counts finished rounds; `model`, `impressions` and `strategy_state` are what the next round
    starts from, `released` is the newest model that was handed out (None before the first round).
    """

    run: str
    plan: Plan
    status: Status = Status.QUEUED
    stage: Stage = Stage.INITIALISING
    reason: str = "queued"
    sites: tuple[str, ...] = ()
    synthesises: bool = False
    finished: int = 0
    model: str | None = None
    released: str | None = None
    impressions: str | None = None
    strategy_state: str | None = None
    # Whether sites get the strategy's state.
    shares_state: bool = False
    # Whether the first impressions serve the whole run; whether they are made while sites train.
    synthesises_once: bool = False
    overlaps: bool = False
    update_tensors: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    local_tensors: tuple[str, ...] = ()
    objective: str = ""
    objective_options_json: str = "{}"
    current: Round | None = None
    # How often the round to open was attempted already.
    attempts: int = 0
    pause_requested: bool = False
    # Sites that each finished round expected and did not aggregate.
    missed: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    records: tuple[RoundRecord, ...] = ()
    purges: tuple[Purge, ...] = ()
    started_at: float | None = None
    finished_at: float | None = None

    def purge_of(self, round_number: int) -> Purge | None:
        """The purge that removed a round's bank, None if none did."""
        return next((purge for purge in self.purges if round_number in purge.rounds), None)

    @property
    def best(self) -> RoundRecord | None:
        """The finished round with the best validation accuracy, the earlier of equals; never chosen on test data.

        Without any validation figure, the last round.
        """
        scored = [r for r in self.records if r.validation_accuracy is not None]
        if not scored:
            return self.records[-1] if self.records else None
        return max(scored, key=lambda r: (r.validation_accuracy or 0.0, -r.round))


def needed(state: RunState) -> set[str]:
    """Digests of every artifact that the run, or who reads its results, can still ask for."""
    found: set[str | None] = {state.plan.training.initial}
    for record in state.records:
        found.add(record.model)
        if state.purge_of(record.round) is None:
            found.add(record.impressions_digest)
    if not state.status.final:
        found |= {state.model, state.released, state.impressions, state.strategy_state}
        if (current := state.current) is not None:
            found |= {current.model, current.released, current.strategy_state, current.new_impressions}
            found |= {update.digest for update in current.reported.values()}
    return {digest for digest in found if digest}


def superseded(before: RunState, after: RunState) -> set[str]:
    """Digests that the end of a round, or of the run, left behind; empty while the round goes on.

    These are the round's updates (the global model holds what they brought), the strategy's state before it, and the
    model that the sites trained from, where another is handed out. The first model is never among them: it may be the
    operator's.
    """
    if before.current is None and not after.status.final:
        return set()
    if (
        before.current is not None
        and after.current is not None
        and after.current.number == before.current.number
    ):
        return set()
    found: set[str | None] = {before.strategy_state, before.model if before.finished else None}
    if after.status.final:
        found |= {after.strategy_state, after.model if after.finished else None}
    if (current := before.current) is not None:
        found |= {current.model, current.strategy_state}
        found |= {update.digest for update in current.reported.values()}
    return {digest for digest in found if digest} - needed(after)


def with_item(mapping: Mapping[K, V], key: K, value: V) -> Mapping[K, V]:
    """A read-only copy of `mapping` with one item more."""
    return MappingProxyType({**mapping, key: value})
