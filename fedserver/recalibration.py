"""The stage between a merge and its evaluation in which BatchNorm statistics are measured anew. Pure; a part of
`round_machine`.

Each site whose update was merged passes its training images through the model that is to be handed out and tells what the
BatchNorm layers saw; the coordinator pools that into the model. A site whose stored answer is damaged is asked again. Where
too few sites answer, or pooling fails, the model stays as it was merged and the round goes on.
Source: Wu & Johnson 2021, Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 3 (PreciseBN).
"""

from dataclasses import dataclass, replace
from types import MappingProxyType

from fedserver import round_events as ev
from fedserver.round_state import Round, RunState, Stage, Statistics, with_item

RecalibrationEvent = (
    ev.StatisticsStored
    | ev.StatisticsLetGo
    | ev.StatisticsLost
    | ev.ModelRecalibrated
    | ev.RecalibrationSkipped
)


@dataclass(frozen=True, slots=True)
class Recalibrate:
    """Have a site measure the BatchNorm statistics of the merged model."""

    round: int
    site: str
    model: str


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """Put the sites' statistics into the model, in site order: (site, digest, report of its update)."""

    round: int
    model: str
    statistics: tuple[tuple[str, str, ev.Report], ...]


def recalibration_work(state: RunState, current: Round) -> tuple[Recalibrate | PoolStatistics, ...]:
    """What should be under way in this stage: measuring, and when all have answered, pooling."""
    assert current.released is not None
    if current.recalibrating:
        return tuple(Recalibrate(current.number, site, current.released) for site in current.unmeasured)
    if len(current.statistics) < state.plan.min_sites:
        return ()
    found = tuple(
        (s, current.statistics[s].digest, current.reported[s].report) for s in sorted(current.statistics)
    )
    return (PoolStatistics(current.number, current.released, found),)


def can_happen(current: Round, event: RecalibrationEvent) -> bool:
    """Whether the event fits the round, if its run is in this stage."""
    if isinstance(event, ev.StatisticsStored | ev.StatisticsLetGo):
        return current.awaits_statistics(event.site)
    if isinstance(event, ev.StatisticsLost) and not event.lost.keys() <= current.statistics.keys():
        return False
    return not current.recalibrating


def apply_recalibration(state: RunState, current: Round, event: RecalibrationEvent) -> RunState:
    """The state after an event of this stage."""
    match event:
        case ev.StatisticsStored():
            measured = Statistics(event.digest, event.num_examples)
            changed = replace(current, statistics=with_item(current.statistics, event.site, measured))
            return replace(state, current=changed)
        case ev.StatisticsLetGo():
            changed = replace(current, not_measured=with_item(current.not_measured, event.site, event.reason))
            return replace(state, current=changed)
        case ev.StatisticsLost():
            kept = {s: found for s, found in current.statistics.items() if s not in event.lost}
            return replace(state, current=replace(current, statistics=MappingProxyType(kept)))
        case ev.ModelRecalibrated():
            # Where the strategy averages models over rounds, sites go on from the newest one as it was merged: training
            # normalises by batch and reads no statistics (layers frozen at them are refused in such a run).
            newest = current.model != current.released
            changed = replace(
                current,
                model=current.model if newest else event.model,
                released=event.model,
                merged=current.released,
                not_measured={**current.not_measured, **event.rejected},
                recalibrated_at=event.at,
            )
            return to_evaluation(state, changed)
        case ev.RecalibrationSkipped():
            return to_evaluation(
                state, replace(current, recalibrated_at=event.at, not_recalibrated=event.reason)
            )


def after_merge(state: RunState, current: Round) -> RunState:
    """Go on from a merge: to this stage if the run wants it."""
    if not state.statistic_tensors:
        return to_evaluation(state, current)
    reason = "sites measure the BatchNorm statistics of the merged model"
    return replace(state, current=current, stage=Stage.RECALIBRATING, reason=reason)


def to_evaluation(state: RunState, current: Round) -> RunState:
    """Go on to the evaluation of the round's model."""
    return replace(state, current=current, stage=Stage.EVALUATING, reason="sites evaluate the new model")
