"""Updates that come after their round closed, and sites that fail round after round: how a run's state takes them. Pure.

Where the plan folds, a site that was let go for being slow becomes a straggler when its round closes: what it was asked
goes on being wanted, and its update, once it is there, waits for the next aggregation. It is asked for nothing else
meanwhile. Where the plan drops, there are no stragglers.

A site that fails `limits.park_after` rounds in a row is parked for `limits.park_rounds`; then it is asked again, and one
more failure parks it again, until a round goes well.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from fedserver import round_events as ev
from fedserver.round_state import LateUpdate, Parking, Round, RunState, Straggler, Update, with_item

V = TypeVar("V")


def take_late(state: RunState, event: ev.UpdateStored | ev.SiteLetGo) -> RunState | None:
    """The state after a straggler delivered, or gave up; None if the event is none of a straggler's."""
    straggler = state.stragglers.get(event.site)
    if straggler is None or straggler.round != event.round:
        return None
    left = _without(state.stragglers, event.site)
    if isinstance(event, ev.SiteLetGo):
        return replace(state, stragglers=left)
    update = LateUpdate(straggler, Update(event.digest, event.payload_bytes, event.report))
    return replace(
        state,
        stragglers=left,
        late=with_item(state.late, event.site, update),
        failures=_without(state.failures, event.site),
    )


def close_collection(state: RunState, current: Round) -> RunState:
    """The state whose round goes on to its aggregation: who is late from now on, and which late updates go into it."""
    if not state.folds:
        return replace(state, current=current)
    assert state.model is not None
    shared = state.strategy_state if state.shares_state else None
    new = {
        site: Straggler(
            current.number, current.attempt, state.model, state.impressions, shared,
            current.registered_examples.get(site, 0),
        )
        for site in sorted(current.slow)
    }  # fmt: skip
    folding = {site: late for site, late in state.late.items() if late.asked.round < current.number}
    return replace(
        state,
        current=replace(current, folding=MappingProxyType(folding)),
        stragglers=MappingProxyType({**state.stragglers, **new}),
    )


def open_again(state: RunState, number: int) -> tuple[RunState, Mapping[str, Update]]:
    """The state in which round `number` is asked for again, and what has come late of it: it is in time now."""
    in_time = {site: late.update for site, late in state.late.items() if late.asked.round == number}
    return (
        replace(
            state,
            stragglers=_keep(state.stragglers, lambda asked: asked.round != number),
            late=_keep(state.late, lambda late: late.asked.round != number),
        ),
        in_time,
    )


def used_up(state: RunState, current: Round) -> Mapping[str, LateUpdate]:
    """The late updates that are left after the round's aggregation: each goes into one only."""
    return MappingProxyType({s: late for s, late in state.late.items() if current.folding.get(s) != late})


def after_round(state: RunState, current: Round) -> RunState:
    """The state after a round is over: who is waited for no longer, who failed it, who is parked."""
    limits, number = state.plan.limits, current.number
    failures = dict(state.failures)
    parked = {site: parking for site, parking in state.parked.items() if parking.until > number + 1}
    for site in current.registered:
        if site in current.accepted:
            failures.pop(site, None)
        elif site not in state.late:  # else it is late, and here
            failures[site] = failures.get(site, 0) + 1
            if 0 < limits.park_after <= failures[site]:
                parked[site] = _parking(current, site, failures[site], limits.park_rounds)
    return replace(
        state,
        stragglers=_keep(state.stragglers, lambda asked: number - asked.round < limits.late_rounds),
        failures=MappingProxyType(failures),
        parked=MappingProxyType(parked),
    )


def resting(state: RunState, number: int) -> dict[str, str]:
    """Sites that round `number` does not ask, though they may be there: stragglers, with the reason."""
    return {
        site: f"still at work on round {asked.round}; its update counts when it comes"
        for site, asked in state.stragglers.items()
        if asked.round != number
    }


def _parking(current: Round, site: str, failures: int, rounds: int) -> Parking:
    until = current.number + rounds + 1
    why = current.rejected.get(site) or current.let_go.get(site) or "no update"
    return Parking(until, f"parked until round {until}, after {failures} failed rounds in a row; last: {why}")


def _without(mapping: Mapping[str, V], key: str) -> Mapping[str, V]:
    return MappingProxyType({k: v for k, v in mapping.items() if k != key})


def _keep(mapping: Mapping[str, V], kept: Callable[[V], bool]) -> Mapping[str, V]:
    return MappingProxyType({k: v for k, v in mapping.items() if kept(v)})
