"""What should be under way in a state of a run, and what it needs: pure functions of the state."""

from dataclasses import dataclass

from fedserver import recalibration
from fedserver import round_events as ev
from fedserver.recalibration import PoolStatistics, Recalibrate
from fedserver.round_state import Round, RunState, Stage, Status, Straggler


@dataclass(frozen=True, slots=True)
class Initialise:
    """Build the first global model."""


@dataclass(frozen=True, slots=True)
class Train:
    """Have a site train on the global model. `attempt` tells a repetition from the first asking."""

    round: int
    attempt: int
    site: str
    model: str
    impressions: str | None
    strategy_state: str | None = None


@dataclass(frozen=True, slots=True)
class Aggregate:
    """Merge updates, in site order: (site, digest, report).

    `released` is the model handed out before, None in the first round.
    """

    round: int
    model: str
    updates: tuple[tuple[str, str, ev.Report], ...]
    strategy_state: str | None = None
    released: str | None = None
    # Training images that sites had said they have when the round opened: (site, number).
    registered_examples: tuple[tuple[str, int], ...] = ()
    # Updates of earlier rounds, in site order.
    late: tuple["LateArrival", ...] = ()


@dataclass(frozen=True, slots=True)
class LateArrival:
    """A late update to fold: the round that it was trained in, from which model, on how many registered images."""

    site: str
    round: int
    model: str
    digest: str
    report: ev.Report
    registered_examples: int


@dataclass(frozen=True, slots=True)
class Synthesise:
    """Make impressions through a global model. `previous` is the bank before, `last_model` the model before."""

    round: int
    model: str
    previous: str | None
    last_model: str | None


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Have a site measure the new global model."""

    round: int
    site: str
    model: str


@dataclass(frozen=True, slots=True)
class EvaluateHere:
    """Measure the new global model on the coordinator's own test set."""

    round: int
    model: str


@dataclass(frozen=True, slots=True)
class ScoreUpdates:
    """Measure, on the coordinator's own images, what local training did: (site, digest) of the accepted updates.

    `model` is the one that the sites started from.
    """

    round: int
    model: str
    updates: tuple[tuple[str, str], ...]


SiteCommand = Train | Recalibrate | Evaluate
Command = SiteCommand | Initialise | Aggregate | PoolStatistics | Synthesise | EvaluateHere | ScoreUpdates


def work(state: RunState) -> tuple[Command, ...]:
    """Everything that should be under way in this state."""
    if state.stage is Stage.INITIALISING and state.status is Status.RUNNING:
        return (Initialise(),)
    if state.status not in (Status.RUNNING, Status.WAITING):
        return ()
    late = tuple(_train_on(site, asked) for site, asked in sorted(state.stragglers.items()))
    current = state.current
    if current is None:
        return late
    return (*_round_work(state, current), *synthesis_work(state, current), *late)


def task_of(state: RunState, site: str) -> SiteCommand | None:
    """What `work` asks of one site."""
    if state.status not in (Status.RUNNING, Status.WAITING):
        return None
    if (asked := state.stragglers.get(site)) is not None:
        return _train_on(site, asked)
    current = state.current
    if current is None:
        return None
    if state.stage is Stage.TRAINING and state.awaits_update(site, current.number):
        return _train(state, current, site)
    if state.stage is Stage.RECALIBRATING and current.awaits_statistics(site):
        assert current.released is not None
        return Recalibrate(current.number, site, current.released)
    if state.stage is Stage.EVALUATING and current.awaits_figures(site):
        assert current.released is not None
        return Evaluate(current.number, site, current.released)
    return None


def needed_by(state: RunState, site: str) -> frozenset[str]:
    """Digests of the artifacts that the site's present work needs."""
    if site not in state.sites:
        return frozenset()
    current, asked = state.current, state.stragglers.get(site)
    found = {state.model, state.impressions, current.released if current is not None else None}
    if state.shares_state:
        found.add(state.strategy_state)
    if asked is not None:
        found |= {asked.model, asked.impressions, asked.strategy_state}
    return frozenset(digest for digest in found if digest is not None)


def _train(state: RunState, current: Round, site: str) -> Train:
    assert state.model is not None
    shared = state.strategy_state if state.shares_state else None
    return Train(current.number, current.attempt, site, state.model, state.impressions, shared)


def _train_on(site: str, asked: Straggler) -> Train:
    """A straggler goes on with what it was asked."""
    return Train(asked.round, asked.attempt, site, asked.model, asked.impressions, asked.strategy_state)


def synthesis_work(state: RunState, current: Round) -> tuple[Synthesise, ...]:
    """The making of impressions, if this round's are still to be made and there is a model for it."""
    if current.synthesised is not None:
        return ()
    assert state.model is not None
    if state.overlaps:
        before = state.records[-2].model if len(state.records) > 1 else None
        model = state.released or state.model
        return (Synthesise(current.number, model, state.impressions, before),)
    if current.released is None or state.stage is Stage.RECALIBRATING:
        return ()
    before = state.released or state.model
    return (Synthesise(current.number, current.released, state.impressions, before),)


def _round_work(state: RunState, current: Round) -> tuple[Command, ...]:
    if state.stage is Stage.TRAINING:
        outstanding = set(current.outstanding)
        return tuple(
            _train(state, current, site)
            for site in current.registered
            if site in outstanding or state.awaits_update(site, current.number)
        )
    if state.stage is Stage.AGGREGATING:
        assert state.model is not None
        updates = tuple(
            (s, current.reported[s].digest, current.reported[s].report) for s in sorted(current.reported)
        )
        late = tuple(
            LateArrival(
                site, found.asked.round, found.asked.model, found.update.digest, found.update.report,
                found.asked.registered_examples,
            )
            for site, found in sorted(current.folding.items())
        )  # fmt: skip
        return (
            Aggregate(
                current.number, state.model, updates, state.strategy_state, state.released,
                tuple(sorted(current.registered_examples.items())), late,
            ),
        )  # fmt: skip
    if state.stage is Stage.RECALIBRATING:
        return recalibration.recalibration_work(state, current)
    if state.stage is Stage.EVALUATING:
        released = current.released
        assert released is not None
        commands: list[Command] = [Evaluate(current.number, s, released) for s in current.unevaluated]
        if awaits_figures(state, current, ""):
            commands.append(EvaluateHere(current.number, released))
        if awaits_scores(state, current):
            assert state.model is not None
            updates_to_score = tuple((s, current.reported[s].digest) for s in sorted(current.accepted))
            commands.append(ScoreUpdates(current.number, state.model, updates_to_score))
        return tuple(commands)
    return ()


def awaits_figures(state: RunState, current: Round, site: str) -> bool:
    """Whether a site's figures, or under the name "" those of the coordinator's own set, are still expected."""
    if site == "":
        return state.plan.evaluation.data is not None and "" not in {
            **current.evaluations,
            **current.not_evaluated,
        }
    return current.awaits_figures(site)


def awaits_scores(state: RunState, current: Round) -> bool:
    """Whether what local training did to each class is still to be measured here."""
    return state.plan.evaluation.updates_data is not None and current.scores is None
