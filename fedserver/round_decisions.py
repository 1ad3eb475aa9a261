"""What follows now, from a run's state, who is here, and how late it is. Pure: time and presence are arguments.

A decision is an event with its reason; it is journalled like any other fact, so replay needs no clock.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from fedserver import round_events as ev
from fedserver.figures import round_record
from fedserver.round_state import RunState, Stage, Status
from fedserver.round_work import awaits_figures, awaits_scores
from fedserver.sampling import sites_of_round
from fedserver.stragglers import resting

MAX_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class Withheld:
    """A site gets no further work, and why; `at_once`: it is let go of what it has as well."""

    reason: str
    at_once: bool


@dataclass(frozen=True, slots=True)
class Presence:
    """A site as the coordinator sees it. Times are seconds on a monotonic clock."""

    connected: bool
    # Why a connected site can't take part; empty if it can.
    unable: str
    # When the connection came or went.
    since: float
    # When its work was last seen to move.
    last_progress: float
    withheld: Withheld | None = None
    # Training images that it says it has; 0 if it said nothing.
    num_examples: int = 0
    # Whether its agent can measure BatchNorm statistics.
    knows_recalibration: bool = True

    @property
    def able(self) -> bool:
        """Whether it can begin a round now."""
        return self.connected and not self.unable and self.withheld is None


@dataclass(frozen=True, slots=True)
class World:
    """Who is here and how late it is.

    `now` and `stage_since` (when the present stage was entered, or the coordinator started) are seconds on a monotonic
    clock, `wall` seconds since the epoch; `bytes_down` were sent to sites since the round opened.
    """

    now: float
    wall: float
    stage_since: float
    sites: Mapping[str, Presence]
    bytes_down: int = 0
    # Why no round may be opened; empty if it may.
    held: str = ""


def decide(state: RunState, world: World) -> tuple[ev.Event, ...]:
    """What follows now; empty when nothing does. Ask again after applying: one decision can bring the next."""
    if state.status.final or state.status is Status.QUEUED:
        return ()
    if state.finished >= state.plan.rounds or _stopped_early(state):
        return (_end(state, world),)
    match state.stage:
        case Stage.OPENING:
            return _decide_opening(state, world)
        case Stage.TRAINING:
            return _decide_collection(state, world)
        case Stage.RECALIBRATING:
            return _decide_recalibration(state, world)
        case Stage.EVALUATING:
            return _decide_evaluation(state, world)
        case _:
            return ()


# Facts that are about one site.
_OF_ONE_SITE = (
    ev.TaskStarted
    | ev.UpdateStored
    | ev.SiteLetGo
    | ev.StatisticsStored
    | ev.StatisticsLetGo
    | ev.EvaluationReported
    | ev.EvaluationLetGo
)


def concerned(state: RunState, events: Iterable[ev.Event]) -> frozenset[str] | None:
    """The sites that facts which led to `state` are about, if nothing follows from them for anything else: other sites
    are still awaited. None if something may.
    """
    sites = set()
    for event in events:
        if not isinstance(event, _OF_ONE_SITE) or not event.site:
            return None
        sites.add(event.site)
    current = state.current
    if current is None or state.status.final:
        return None
    awaited = (
        (state.stage is Stage.TRAINING and current.collecting)
        or (state.stage is Stage.RECALIBRATING and current.recalibrating)
        or (state.stage is Stage.EVALUATING and current.measuring)
    )
    return frozenset(sites) if awaited else None


def _stopped_early(state: RunState) -> bool:
    patience = state.plan.training.early_stop
    best = state.best
    return patience is not None and best is not None and state.finished - best.round >= patience


def _end(state: RunState, world: World) -> ev.RunFinished:
    done = f"{state.finished} rounds finished"
    if state.finished < state.plan.rounds:
        done += f", stopped early: no better validation accuracy in {state.plan.training.early_stop} rounds"
    if not state.missed:
        return ev.RunFinished(at=world.wall, status="DONE", reason=done)
    who = sorted({site for sites in state.missed.values() for site in sites})
    details = "; ".join(
        f"{site} in round{'s' if len(rounds) > 1 else ''} {', '.join(map(str, rounds))}"
        for site in who
        if (rounds := [number for number, sites in state.missed.items() if site in sites])
    )
    return ev.RunFinished(at=world.wall, status="DEGRADED", reason=f"{done}; missing: {details}")


def _decide_opening(state: RunState, world: World) -> tuple[ev.Event, ...]:
    plan, number = state.plan, state.finished + 1
    if state.attempts >= MAX_ATTEMPTS:
        reason = f"round {number} failed {MAX_ATTEMPTS} times: {state.reason}"
        return (ev.RunFinished(at=world.wall, status="FAILED", reason=reason),)
    if world.held:
        return ()
    expected = sites_of_round(plan, state.sites, number)
    world = _for_round(state, world, number, expected)
    here = tuple(s for s in expected if (p := world.sites.get(s)) and p.able)
    reported = state.current.reported if state.current is not None else {}
    absent = [s for s in expected if s not in here and s not in reported]
    waited = world.now - world.stage_since
    if not absent:
        reason = f"all {len(expected)} expected sites are here"
    elif len(expected) - len(absent) < plan.min_sites:
        if waited <= plan.limits.round_deadline_s:
            return ()
        reason = (
            f"round {number}: waited {waited:.0f} s for {plan.min_sites} sites, here: {', '.join(here) or 'none'}; "
            f"missing: {_why_absent(absent, world)}"
        )
        return (ev.RunFinished(at=world.wall, status="FAILED", reason=reason),)
    elif waited <= plan.limits.round_deadline_s and any(
        _absent_for(s, world) < plan.limits.join_wait_s for s in absent
    ):
        return ()
    else:
        reason = f"{len(here)} of {len(expected)} sites are here; missing: {_why_absent(absent, world)}"
    return (
        ev.RoundOpened(
            at=world.wall,
            round=number,
            attempt=state.attempts + 1,
            expected=expected,
            registered=here,
            reason=reason,
            absent={site: _why(site, world) for site in absent},
            registered_examples={site: n for site in here if (n := world.sites[site].num_examples) > 0},
        ),
    )


def _for_round(state: RunState, world: World, number: int, expected: tuple[str, ...]) -> World:
    """The world as round `number` sees it: stragglers and parked sites are withheld from it, and nobody waits for them.

    Parked sites are asked after all where the others are too few for a round.
    """
    busy = resting(state, number)
    parked = {site: parking.reason for site, parking in state.parked.items() if number < parking.until}
    reported = state.current.reported if state.current is not None else {}
    others = [s for s in expected if s not in busy and s not in parked]
    able = [s for s in others if s in reported or ((p := world.sites.get(s)) and p.able)]
    if len(able) < state.plan.min_sites:
        parked = {}
    nowhere = Presence(connected=False, unable="", since=0.0, last_progress=0.0)
    sites = dict(world.sites)
    for site, reason in {**parked, **busy}.items():
        sites[site] = replace(sites.get(site, nowhere), withheld=Withheld(reason, at_once=False))
    return replace(world, sites=sites)


def _absent_for(site: str, world: World) -> float:
    """Seconds since the site went, or since the coordinator began to wait for one it has never seen.

    Nobody waits for a site that is withheld.
    """
    presence = world.sites.get(site)
    if presence is not None and presence.withheld is not None:
        return math.inf
    return world.now - (presence.since if presence is not None else world.stage_since)


def _why_absent(absent: list[str], world: World) -> str:
    return ", ".join(f"{site} ({_why(site, world)})" for site in absent)


def _why(site: str, world: World) -> str:
    presence = world.sites.get(site)
    if presence is not None and presence.withheld is not None:
        return presence.withheld.reason
    if presence is None or not presence.connected:
        return "not connected"
    return presence.unable


def waiting_for(state: RunState, world: World) -> str:
    """What the run waits for, in words for the operator; empty when it waits for nobody."""
    if state.stage is Stage.OPENING:
        if world.held:
            return world.held
        expected = sites_of_round(state.plan, state.sites, state.finished + 1)
        world = _for_round(state, world, state.finished + 1, expected)
        absent = [s for s in expected if not ((p := world.sites.get(s)) and p.able)]
        waited = world.now - world.stage_since
        return f"waiting {waited:.0f} s for {_why_absent(absent, world)}" if absent else ""
    current = state.current
    if current is not None and state.stage is Stage.TRAINING:
        return f"round {current.number}: waiting for updates of {', '.join(current.outstanding)}"
    if current is not None and state.stage is Stage.RECALIBRATING and current.recalibrating:
        return f"round {current.number}: waiting for statistics of {', '.join(current.unmeasured)}"
    if current is not None and state.stage is Stage.EVALUATING and current.unevaluated:
        return f"round {current.number}: waiting for figures of {', '.join(current.unevaluated)}"
    return ""


def _taken_away(site: str, world: World) -> bool:
    """Whether an operator takes the site's work from it at once."""
    presence = world.sites.get(site)
    return presence is not None and presence.withheld is not None and presence.withheld.at_once


def _lost(site: str, state: RunState, world: World) -> str:
    """Why a site at work should be let go; empty if it should not."""
    stall = state.plan.limits.stall_timeout_s
    presence = world.sites.get(site)
    if presence is not None and presence.withheld is not None and _taken_away(site, world):
        return presence.withheld.reason
    if presence is None or not presence.connected:
        gone = max(presence.since if presence is not None else world.stage_since, world.stage_since)
        return f"no connection for {world.now - gone:.0f} s" if world.now - gone > stall else ""
    quiet = world.now - max(presence.last_progress, presence.since, world.stage_since)
    return f"no progress for {quiet:.0f} s" if quiet > stall else ""


def _decide_collection(state: RunState, world: World) -> tuple[ev.Event, ...]:
    current = state.current
    assert current is not None
    late = world.now - world.stage_since > state.plan.limits.round_deadline_s
    events: list[ev.Event] = []
    for site in current.outstanding:
        reason = (
            f"round deadline of {state.plan.limits.round_deadline_s:g} s passed"
            if late
            else _lost(site, state, world)
        )
        if reason:
            slow = late or not _taken_away(site, world)
            events.append(
                ev.SiteLetGo(at=world.wall, round=current.number, site=site, reason=reason, slow=slow)
            )
    if events or current.collecting:
        return tuple(events)
    lost = "; ".join(f"{site}: {why}" for site, why in current.let_go.items())
    reason = f"{len(current.reported)} of {len(current.expected)} sites reported" + (
        f" ({lost})" if lost else ""
    )
    return (ev.CollectionClosed(at=world.wall, round=current.number, reason=reason),)


def _decide_recalibration(state: RunState, world: World) -> tuple[ev.Event, ...]:
    current = state.current
    assert current is not None
    late = world.now - world.stage_since > state.plan.limits.round_deadline_s
    events: list[ev.Event] = []
    for site in current.unmeasured:
        presence = world.sites.get(site)
        if late:
            reason = "round deadline passed"
        elif presence is not None and presence.connected and not presence.knows_recalibration:
            reason = "its agent is of a version that measures no statistics"
        else:
            reason = _lost(site, state, world)
        if reason:
            events.append(ev.StatisticsLetGo(at=world.wall, round=current.number, site=site, reason=reason))
    if events or current.recalibrating or len(current.statistics) >= state.plan.min_sites:
        return tuple(events)
    lost = "; ".join(f"{site}: {why}" for site, why in current.not_measured.items())
    reason = f"only {len(current.statistics)} sites measured, min_sites is {state.plan.min_sites} ({lost})"
    return (ev.RecalibrationSkipped(at=world.wall, round=current.number, reason=reason),)


def _decide_evaluation(state: RunState, world: World) -> tuple[ev.Event, ...]:
    current = state.current
    assert current is not None
    late = world.now - world.stage_since > state.plan.limits.round_deadline_s
    events: list[ev.Event] = []
    for site in current.unevaluated:
        reason = "round deadline passed" if late else _lost(site, state, world)
        if reason:
            events.append(ev.EvaluationLetGo(at=world.wall, round=current.number, site=site, reason=reason))
    if events or current.measuring or current.synthesised is None or awaits_figures(state, current, ""):
        return tuple(events)
    if awaits_scores(state, current):
        return ()
    record = round_record(state, current, world.wall, world.bytes_down)
    return (ev.RoundFinished(at=world.wall, round=current.number, record_json=record.model_dump_json()),)
