"""The state of a run: frozen values, changed only by `round_machine.apply`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TypeVar, cast

from fedcore.plan import Plan
from fedcore.update_verdict import FoldedUpdate, MergeFigures, UpdateVerdict
from fedserver.finished_round import FinishedRound
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
    RECALIBRATING = "recalibrating"
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
class Statistics:
    """A site's durable BatchNorm statistics: their artifact, and how many training images they are of."""

    digest: str
    num_examples: int


@dataclass(frozen=True, slots=True)
class Straggler:
    """What a site was asked whose round closed without it, and whose update is still welcome."""

    round: int
    attempt: int
    model: str
    impressions: str | None
    strategy_state: str | None
    # Training images that it had registered with; 0 if none.
    registered_examples: int = 0


@dataclass(frozen=True, slots=True)
class LateUpdate:
    """An update that came after its round closed; `asked` holds the model that it started from."""

    asked: Straggler
    update: Update


@dataclass(frozen=True, slots=True)
class Parking:
    """A site that is not asked before the round `until`, and why."""

    until: int
    reason: str


@dataclass(frozen=True, slots=True)
class Round:
    """The round under way.

    Invariants: started, reported and let_go hold only registered sites; reported and let_go are disjoint; accepted and
    rejected hold only reported sites; evaluations and not_evaluated are disjoint, and hold only accepted sites and "", the
    coordinator's own set; `model` and `released` are set exactly from the aggregation on; statistics and not_measured
    hold only accepted sites, and are disjoint until the gate refuses some.
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
    # Those let go that may still deliver; and late updates of earlier rounds that go into this one's aggregation.
    slow: frozenset[str] = frozenset()
    folding: Mapping[str, LateUpdate] = field(default_factory=dict)
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
    folded: Mapping[str, FoldedUpdate] = field(default_factory=dict)
    # What sites measured after the merge, and why others did not. When that is over: `released` as it was merged, None if
    # it still is that; or why it is.
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    not_measured: Mapping[str, str] = field(default_factory=dict)
    recalibrated_at: float | None = None
    merged: str | None = None
    not_recalibrated: str = ""
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
        return tuple(filter(self._owes_update, self.registered))

    @property
    def collecting(self) -> bool:
        """Whether some update is still expected."""
        return len(self.reported) + len(self.let_go) < len(self.registered)

    @property
    def measuring(self) -> bool:
        """Whether some site's figures are still expected."""
        own = "" in self.evaluations or "" in self.not_evaluated
        return len(self.evaluations) + len(self.not_evaluated) - own < len(self.accepted)

    @property
    def recalibrating(self) -> bool:
        """Whether some site's statistics are still expected, while the run recalibrates."""
        return len(self.statistics) + len(self.not_measured) < len(self.accepted)

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """Sites whose statistics are still expected: all that the model was made of."""
        return tuple(filter(self._owes_statistics, self.accepted))

    def awaits_statistics(self, site: str) -> bool:
        """Whether the site is among `unmeasured`."""
        return self._owes_statistics(site) and site in self.accepted

    def awaits_update(self, site: str) -> bool:
        """Whether the site is among `outstanding`."""
        return self._owes_update(site) and site in self.registered

    def awaits_figures(self, site: str) -> bool:
        """Whether the site is among `unevaluated`."""
        return self._owes_figures(site) and site in self.accepted

    def _owes_update(self, site: str) -> bool:
        return site not in self.reported and site not in self.let_go

    def _owes_statistics(self, site: str) -> bool:
        return site not in self.statistics and site not in self.not_measured

    def _owes_figures(self, site: str) -> bool:
        return site not in self.evaluations and site not in self.not_evaluated

    @property
    def unevaluated(self) -> tuple[str, ...]:
        """Sites whose figures are still expected: all that the model was made of."""
        return tuple(filter(self._owes_figures, self.accepted))


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
class Drop:
    """When the model of a round was dropped, in seconds since the epoch, and why."""

    at: float
    reason: str


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
    # What sites measure after each merge; empty in a run that leaves BatchNorm statistics as merged.
    statistic_tensors: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    update_tensors: tuple[tuple[str, str, tuple[int, ...]], ...] = ()
    local_tensors: tuple[str, ...] = ()
    personal_tensors: tuple[str, ...] = ()
    objective: str = ""
    objective_options_json: str = "{}"
    current: Round | None = None
    # How often the round to open was attempted already.
    attempts: int = 0
    pause_requested: bool = False
    # Sites that each finished round expected and did not aggregate.
    missed: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    records: tuple[FinishedRound, ...] = ()
    purges: tuple[Purge, ...] = ()
    # Finished rounds whose model was dropped.
    dropped: Mapping[int, Drop] = field(default_factory=dict)
    # Sites whose late update is still welcome, and late updates that wait for an aggregation; both empty unless the plan
    # folds. A straggler is asked for no other round.
    stragglers: Mapping[str, Straggler] = field(default_factory=dict)
    late: Mapping[str, LateUpdate] = field(default_factory=dict)
    # Rounds that a site failed in a row, and sites that are parked for it.
    failures: Mapping[str, int] = field(default_factory=dict)
    parked: Mapping[str, Parking] = field(default_factory=dict)
    started_at: float | None = None
    finished_at: float | None = None

    def purge_of(self, round_number: int) -> Purge | None:
        """The purge that removed a round's bank, None if none did."""
        return next((purge for purge in self.purges if round_number in purge.rounds), None)

    @property
    def folds(self) -> bool:
        """Whether updates that come late are kept."""
        return self.plan.limits.late_updates == "fold"

    def awaits_update(self, site: str, round_number: int) -> bool:
        """Whether the site's update of this round would be taken now."""
        straggler, current = self.stragglers.get(site), self.current
        if straggler is not None and straggler.round == round_number:
            return True
        if self.stage is not Stage.TRAINING or current is None or current.number != round_number:
            return False
        return current.awaits_update(site) or (self.folds and site in current.slow)

    def open_rounds(self, site: str) -> set[int]:
        """Rounds of which the site's update may still come, or come again."""
        straggler = self.stragglers.get(site)
        current = {self.current.number} if self.current is not None else set()
        return current | ({straggler.round} if straggler is not None else set())

    def stored_update(self, site: str, round_number: int) -> Update | None:
        """The site's update of this round, while it is kept."""
        current = self.current
        if current is not None and current.number == round_number and site in current.reported:
            return current.reported[site]
        for late in (self.late.get(site), current.folding.get(site) if current is not None else None):
            if late is not None and late.asked.round == round_number:
                return late.update
        return None

    @property
    def best(self) -> FinishedRound | None:
        """The finished round with the best validation accuracy, the earlier of equals; never chosen on test data.

        Without any validation figure, the last round.
        """
        scored = [r for r in self.records if r.validation_accuracy is not None]
        if not scored:
            return self.records[-1] if self.records else None
        return max(scored, key=lambda r: (r.validation_accuracy or 0.0, -r.round))


def needed(state: RunState) -> set[str]:
    """Digests of every artifact that the run, or who reads its results, can still ask for."""
    kept = {record.model for record in state.records if record.round not in state.dropped}
    return (kept | undroppable(state)) - {""}


def undroppable(state: RunState) -> set[str]:
    """Of `needed`, all but the models of rounds that nothing but the wish for them keeps."""
    banks = {r.impressions_digest for r in state.records if state.purge_of(r.round) is None}
    return kept_models(state) | {digest for digest in banks if digest}


def kept_models(state: RunState) -> set[str]:
    """`undroppable` but for the banks of finished rounds: its size does not grow with the rounds."""
    found: set[str | None] = {state.plan.training.initial}
    if (best := state.best) is not None:
        found |= {best.model, state.records[-1].model}
    if not state.status.final:
        # Impressions that are made beside training look back to it, and so does a journal that lost its last record.
        found |= {record.model for record in state.records[-2:-1]}
        found |= {state.model, state.released, state.impressions, state.strategy_state}
        if (current := state.current) is not None:
            found |= {current.model, current.released, current.strategy_state, current.new_impressions}
            found |= {update.digest for update in current.reported.values()}
            found |= {measured.digest for measured in current.statistics.values()}
        found |= held_for_late(state, first_model=True)
    return {digest for digest in found if digest}


def held_for_late(state: RunState, *, first_model: bool) -> set[str | None]:
    """What late updates, those to come included, keep beyond their round; with the run's first model or without."""
    late = [*state.late.values(), *(state.current.folding.values() if state.current is not None else ())]
    asked = [*state.stragglers.values(), *(update.asked for update in late)]
    found: set[str | None] = {update.update.digest for update in late}
    found |= {task.model for task in asked if first_model or task.round > 1}
    return found | {task.strategy_state for task in asked}


def superseded(before: RunState, after: RunState) -> set[str]:
    """Digests that the end of a round, or of the run, left behind; and at any time what was kept for a late update,
    and models that were dropped.

    These are the round's updates and statistics (the global model holds what they brought), the model before it was
    recalibrated, the strategy's state before the round, and the model that the sites trained from, where another is
    handed out. The first model is never among them: it may be the
    operator's.
    """
    found = held_for_late(before, first_model=False)
    if after.dropped is not before.dropped:
        found |= {
            r.model for r in after.records if r.round in after.dropped and r.round not in before.dropped
        }
    goes_on = before.current is None or (
        after.current is not None and after.current.number == before.current.number
    )
    if goes_on and not after.status.final:
        return {digest for digest in found if digest} - needed(after) if found else set()
    found |= {before.strategy_state, before.model if before.finished else None}
    if after.status.final:
        found |= {after.strategy_state, after.model if after.finished else None}
    if (current := before.current) is not None:
        found |= {current.model, current.released, current.strategy_state, current.merged}
        found |= {update.digest for update in current.reported.values()}
        found |= {measured.digest for measured in current.statistics.values()}
    return {digest for digest in found if digest} - needed(after)


def with_item(mapping: Mapping[K, V], key: K, value: V) -> Mapping[K, V]:
    """A read-only copy of `mapping`, a dictionary or a view of one, with one item more."""
    # `|` copies what is behind a view at once; `**` would go through it item by item, for each of a thousand sites.
    return MappingProxyType(cast("dict[K, V]", mapping) | {key: value})
