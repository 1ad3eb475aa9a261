"""The life of a run, as pure functions. No I/O, no clock, no threads.

apply(state, event) -> state        what is true after something happened
work(state) -> commands             what should be under way, in `round_work`; the driver makes it so
decide(state, world) -> events      what follows now: in `round_decisions`

An event is applied only after it is journalled, so replaying the journal gives the same state, and `work` of that state is
all that recovery has to do.
"""

from dataclasses import replace
from types import MappingProxyType

from fedcore.errors import ConflictError
from fedserver import recalibration
from fedserver import round_events as ev
from fedserver.finished_round import FinishedRound
from fedserver.impression_purges import apply_purge
from fedserver.model_drops import apply_drop
from fedserver.round_state import Round, RunState, Stage, Status, Update, with_item
from fedserver.round_work import awaits_figures, awaits_scores, synthesis_work
from fedserver.stragglers import after_round, close_collection, open_again, take_late, used_up
from fedserver.synthesis.schedule import should_synthesise

# Also when the run is over.
_AT_ANY_TIME = ev.ImpressionsPurged | ev.PurgeConfirmed | ev.ModelsDropped


def apply(state: RunState, event: ev.Event) -> RunState:
    """The state after an event. Raises ConflictError if the event can't happen in this state."""
    if isinstance(event, _AT_ANY_TIME):
        return apply_drop(state, event) if isinstance(event, ev.ModelsDropped) else apply_purge(state, event)
    if isinstance(event, ev.UpdateStored | ev.SiteLetGo):
        taken = take_late(state, event)
        if taken is not None:
            return taken
    if state.status.final:
        raise ConflictError(f"run {state.run} is over ({state.status}): {event.kind} can't happen")
    match event:
        case ev.RunStarted():
            _expect(state, state.status is Status.QUEUED, event)
            return replace(
                state,
                status=Status.RUNNING,
                reason="building the first model",
                sites=event.sites,
                synthesises=event.synthesises,
                started_at=event.at,
            )
        case ev.RunInitialised():
            _expect(state, state.stage is Stage.INITIALISING and state.status is Status.RUNNING, event)
            initialised = replace(
                state,
                model=event.model,
                update_tensors=event.update_tensors,
                local_tensors=event.local_tensors,
                personal_tensors=event.personal_tensors,
                objective=event.objective,
                objective_options_json=event.objective_options_json,
                shares_state=event.shares_state,
                synthesises_once=event.synthesises_once,
                overlaps=event.overlaps,
                statistic_tensors=event.statistic_tensors,
            )
            return _to_opening(initialised)
        case ev.PauseRequested():
            _expect(state, state.status is not Status.QUEUED and not state.pause_requested, event)
            pausing = replace(
                state, pause_requested=True, reason=f"{event.by} asked to pause: this round still finishes"
            )
            return _to_opening(pausing) if state.stage is Stage.OPENING else pausing
        case ev.ResumeRequested():
            _expect(state, state.pause_requested, event)
            resumed = replace(state, pause_requested=False, reason=f"resumed by {event.by}")
            return _to_opening(resumed) if state.stage is Stage.PAUSED else resumed
        case ev.RunFinished():
            return replace(
                state,
                status=Status(event.status),
                stage=Stage.OVER,
                reason=event.reason,
                current=None,
                stragglers={},
                late={},
                finished_at=event.at,
            )
        case ev.RoundOpened():
            return _open(state, event)
        case ev.RoundFinished():
            return _finish_round(state, event)
        case _:
            return _apply_to_round(state, event)


def _apply_to_round(state: RunState, event: ev.Event) -> RunState:
    current = state.current
    if current is None or getattr(event, "round", None) != current.number:
        raise ConflictError(f"run {state.run}: {event.kind} is for a round that is not under way")
    match event:
        case ev.TaskStarted():
            new = state.stage is Stage.TRAINING and current.awaits_update(event.site)
            _expect(state, new and event.site not in current.started, event)
            return replace(state, current=replace(current, started=current.started | {event.site}))
        case ev.UpdateStored():
            _expect(state, state.awaits_update(event.site, event.round), event)
            update = Update(event.digest, event.payload_bytes, event.report)
            changed = replace(
                current,
                started=current.started | {event.site},
                reported=with_item(current.reported, event.site, update),
                let_go=MappingProxyType({s: why for s, why in current.let_go.items() if s != event.site}),
                slow=current.slow - {event.site},
            )
            return replace(state, current=changed)
        case ev.SiteLetGo():
            _expect(state, state.stage is Stage.TRAINING and current.awaits_update(event.site), event)
            changed = replace(
                current,
                let_go=with_item(current.let_go, event.site, event.reason),
                slow=current.slow | {event.site} if event.slow else current.slow,
            )
            return replace(state, current=changed)
        case ev.CollectionClosed():
            _expect(state, state.stage is Stage.TRAINING and not current.collecting, event)
            closed = replace(current, closed_at=event.at)
            if len(closed.reported) < state.plan.min_sites:
                return _to_opening(replace(state, current=closed), f"round {current.number}: {event.reason}")
            return replace(close_collection(state, closed), stage=Stage.AGGREGATING, reason=event.reason)
        case ev.AggregationFinished():
            _expect(state, state.stage is Stage.AGGREGATING, event)
            return _aggregated(state, current, event)
        case ev.AggregationFailed():
            _expect(state, state.stage is Stage.AGGREGATING, event)
            return _to_opening(_reject(state, current, event), event.reason)
        case ev.SynthesisFinished():
            # A bank that was begun from one that has been purged meanwhile holds pictures of it.
            from_present = event.previous in (None, state.impressions)
            _expect(state, bool(synthesis_work(state, current)) and from_present, event)
            changed = replace(
                current,
                synthesised=(event.made, event.note),
                synthesised_at=event.at,
                new_impressions=event.impressions,
                synthesis_figures=MappingProxyType(dict(event.figures)),
            )
            return replace(state, current=changed)
        case _ if isinstance(event, recalibration.RecalibrationEvent):
            _expect(
                state, state.stage is Stage.RECALIBRATING and recalibration.can_happen(current, event), event
            )
            return recalibration.apply_recalibration(state, current, event)
        case ev.EvaluationReported() | ev.EvaluationLetGo() | ev.UpdatesScored():
            return _measured(state, current, event)
        case _:
            raise ConflictError(f"run {state.run}: unknown event {event.kind}")


def _measured(
    state: RunState, current: Round, event: ev.EvaluationReported | ev.EvaluationLetGo | ev.UpdatesScored
) -> RunState:
    if isinstance(event, ev.UpdatesScored):
        awaited = awaits_scores(state, current)
    else:
        awaited = awaits_figures(state, current, event.site)
    _expect(state, state.stage is Stage.EVALUATING and awaited, event)
    match event:
        case ev.EvaluationReported():
            found = with_item(current.evaluations, event.site, event.metrics)
            measured = replace(current, evaluated_at=event.at, evaluations=found)
        case ev.EvaluationLetGo():
            let_go = with_item(current.not_evaluated, event.site, event.reason)
            measured = replace(current, evaluated_at=event.at, not_evaluated=let_go)
        case ev.UpdatesScored():
            measured = replace(current, evaluated_at=event.at, scores=event)
    return replace(state, current=measured)


def _expect(state: RunState, condition: bool, event: ev.Event) -> None:
    if not condition:
        raise ConflictError(
            f"run {state.run}: {event.kind} can't happen while it is {state.status}, {state.stage}"
        )


def _to_opening(state: RunState, why: str = "") -> RunState:
    """Wait for sites for the next round, or for the repetition of the one that failed; or pause between rounds."""
    if state.pause_requested and state.current is None:
        return replace(state, status=Status.PAUSED, stage=Stage.PAUSED, reason="paused by an operator")
    reason = f"waiting for sites ({why})" if why else "waiting for sites"
    status = Status.WAITING if state.finished == 0 and state.current is None else Status.RUNNING
    return replace(state, status=status, stage=Stage.OPENING, reason=reason)


def _open(state: RunState, event: ev.RoundOpened) -> RunState:
    _expect(state, state.stage is Stage.OPENING and event.round == state.finished + 1, event)
    _expect(state, event.attempt == state.attempts + 1, event)
    # A repetition keeps the updates that are there, made from the same global model, and the impressions made beside it.
    before = state.current
    state, in_time = open_again(state, event.round)
    kept = {**(before.reported if before is not None else {}), **in_time}
    known = before.registered_examples if before is not None else {}
    current = Round(
        number=event.round,
        attempt=event.attempt,
        expected=event.expected,
        registered=tuple(sorted({*event.registered, *kept})),
        opened_at=before.opened_at if before is not None else event.at,
        absent=MappingProxyType(dict(event.absent)),
        registered_examples=MappingProxyType({**known, **event.registered_examples}),
        started=frozenset(kept),
        reported=MappingProxyType(dict(kept)),
    )
    if before is not None:
        current = replace(
            current,
            synthesised=before.synthesised,
            synthesised_at=before.synthesised_at,
            new_impressions=before.new_impressions,
            synthesis_figures=before.synthesis_figures,
            verdicts=before.verdicts,
        )
    elif not _wants_impressions(state, event.round):
        current = replace(current, synthesised=(0, ""))
    return replace(
        state,
        status=Status.RUNNING,
        stage=Stage.TRAINING,
        reason=event.reason,
        attempts=event.attempt,
        current=current,
        parked=MappingProxyType({s: why for s, why in state.parked.items() if s not in event.registered}),
    )


def _reject(
    state: RunState, current: Round, event: ev.AggregationFinished | ev.AggregationFailed
) -> RunState:
    """Drop updates that the gate refused, so that a repetition asks those sites again."""
    kept = {s: u for s, u in current.reported.items() if s not in event.rejected}
    changed = replace(
        current,
        reported=MappingProxyType(kept),
        rejected=dict(event.rejected),
        verdicts=MappingProxyType({**current.verdicts, **event.verdicts}),
    )
    return replace(state, current=changed)


def _aggregated(state: RunState, current: Round, event: ev.AggregationFinished) -> RunState:
    if len(event.accepted) < state.plan.min_sites:
        why = f"only {len(event.accepted)} updates passed the gate, min_sites is {state.plan.min_sites}"
        return _to_opening(_reject(state, current, event), why)
    changed = replace(
        current,
        model=event.model,
        released=event.released or event.model,
        strategy_state=event.strategy_state or state.strategy_state,
        accepted=event.accepted,
        rejected=dict(event.rejected),
        verdicts=MappingProxyType({**current.verdicts, **event.verdicts}),
        merge=event.merge,
        folded=event.folded,
        aggregated_at=event.at,
    )
    return recalibration.after_merge(replace(state, late=used_up(state, changed)), changed)


def _wants_impressions(state: RunState, round_number: int) -> bool:
    if not state.synthesises:
        return False
    if state.synthesises_once:
        return state.impressions is None
    # Beside training there is only the model that the round before ended with.
    return should_synthesise(state.plan, round_number - 1 if state.overlaps else round_number)


def _finish_round(state: RunState, event: ev.RoundFinished) -> RunState:
    current = state.current
    _expect(state, current is not None and current.number == event.round, event)
    _expect(
        state,
        state.stage is Stage.EVALUATING and current is not None and current.synthesised is not None,
        event,
    )
    assert current is not None
    missed = tuple(s for s in current.expected if s not in current.accepted)
    after = replace(
        after_round(state, current),
        finished=event.round,
        model=current.model,
        released=current.released,
        strategy_state=current.strategy_state,
        impressions=current.new_impressions or state.impressions,
        current=None,
        attempts=0,
        missed=with_item(state.missed, event.round, missed) if missed else state.missed,
        records=(*state.records, FinishedRound.of(event.record_json)),
    )
    return _to_opening(after)
