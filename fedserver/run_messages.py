"""Runs and models as operators see them: from states to messages. Pure."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime

from fedcore.model_card import described
from fedcore.round_record import RoundRecord
from fedcore.text import ranges
from fedcore.v1 import admin_pb2
from fedserver.roster import Roster, Session
from fedserver.round_driver import RunView
from fedserver.round_state import Round, RunState, Stage


def timestamp(seconds: float | None) -> str:
    """RFC 3339 of seconds since the epoch; empty for None."""
    return "" if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def run_message(view: RunView, roster: Roster, waiting: str) -> admin_pb2.Run:
    """Everything there is to say about a run. `waiting` is what it waits for, if anything."""
    state, submission = view.state, view.submission
    best = state.best
    return admin_pb2.Run(
        run=state.run,
        name=state.plan.name,
        state=state.status.value,
        round=state.finished,
        rounds=state.plan.rounds,
        sites=state.sites or state.plan.sites or (),
        strategy=state.plan.strategy,
        phase=_phase(state),
        phase_since=timestamp(view.stage_since_wall),
        reason=waiting or _computing(view.compute) or state.reason,
        progress=[
            _site_progress(state, site, roster.sessions.get(site))
            for site in (() if state.status.final else state.sites)
        ],
        submitted_at=submission.submitted_at,
        finished_at=timestamp(state.finished_at),
        missed=[admin_pb2.MissedRound(round=n, sites=sites) for n, sites in sorted(state.missed.items())],
        last_round_json=state.records[-1].record_json() if state.records else "",
        plan_json=state.plan.to_json(),
        best_round=best.round if best is not None else 0,
        submitted_by=submission.submitted_by,
        models_dropped=ranges(state.dropped) if state.dropped else "",
    )


def _computing(said: Mapping[str, object]) -> str:
    """What the coordinator's compute process is at, in words; empty if it has said nothing."""
    return (
        f"{said['stage']}: {said['done']} of {said['total']}"
        if {"stage", "done", "total"} <= said.keys()
        else ""
    )


def _phase(state: RunState) -> str:
    current = state.current
    if state.stage is Stage.EVALUATING and current is not None and current.synthesised is None:
        return "synthesising"
    return state.stage.value


def _site_progress(state: RunState, site: str, session: Session | None) -> admin_pb2.SiteProgress:
    stage, reason = _late_or_parked(state, site) or _site_stage(state.current, state.stage, site, session)
    message = admin_pb2.SiteProgress(site=site, stage=stage, reason=reason)
    if session is not None and session.run == state.run and stage == session.progress.stage:
        said = session.progress
        message.done, message.total = said.done, said.total
        message.loss, message.images_per_s = said.loss, said.images_per_s
    return message


def _late_or_parked(state: RunState, site: str) -> tuple[str, str] | None:
    if site in state.parked:
        return "parked", state.parked[site].reason
    if site in state.stragglers:
        return "late", f"still at work on round {state.stragglers[site].round}"
    return None


def _site_stage(current: Round | None, stage: Stage, site: str, session: Session | None) -> tuple[str, str]:
    if current is not None and site in current.let_go:
        return "let go", current.let_go[site]
    if current is not None and site in current.absent:
        return "absent", current.absent[site]
    if session is None:
        return "absent", "not connected"
    if current is None or stage is Stage.OPENING:
        return "waiting", session.capabilities.unavailable_reason
    if stage is Stage.TRAINING and current.awaits_update(site):
        return session.progress.stage or "waiting", ""
    if stage is Stage.RECALIBRATING:
        if site in current.statistics:
            return "measured", ""
        if site in current.not_measured:
            return "failed", current.not_measured[site]
        return (session.progress.stage if current.awaits_statistics(site) else "waiting"), ""
    if stage is Stage.EVALUATING:
        if site in current.evaluations:
            return "evaluated", ""
        if site in current.not_evaluated:
            return "failed", current.not_evaluated[site]
        return (session.progress.stage if current.awaits_figures(site) else "waiting"), ""
    return ("reported" if site in current.reported else "waiting"), ""


def model_message(state: RunState, record: RoundRecord, payload_bytes: int) -> admin_pb2.Model:
    """One round's global model. Of one that was dropped there are no bytes."""
    best, drop = state.best, state.dropped.get(record.round)
    return admin_pb2.Model(
        run=state.run,
        round=record.round,
        digest=record.model,
        payload_bytes=payload_bytes,
        best=best is not None and best.round == record.round,
        card_json=json.dumps(model_card(state, record)),
        impressions_digest=record.impressions_digest,
        dropped_at=timestamp(drop.at) if drop is not None else "",
        dropped_reason=drop.reason if drop is not None else "",
    )


def model_card(state: RunState, record: RoundRecord) -> dict[str, object]:
    """What one needs to use a model file: architecture, classes, transform, figures, digest."""
    plan = state.plan
    return {
        "run": state.run,
        "round": record.round,
        "digest": record.model,
        **described(plan),
        "metrics": {
            "accuracy": record.accuracy,
            "balanced_accuracy": record.balanced_accuracy,
            "validation_accuracy": record.validation_accuracy,
        },
        # Where each site has layers of its own, it scored this model with those in it.
        "metrics_of": "sites' own models" if state.local_tensors or state.personal_tensors else "this model",
        "seed": plan.seed,
        "local_tensors": list(state.local_tensors),
        "personal_tensors": list(state.personal_tensors),
    }


def activity(session: Session | None) -> str:
    """What a site does now, in words."""
    if session is None:
        return "not connected"
    if session.assignment is None or not session.progress.stage:
        return "idle"
    return f"{session.progress.stage} (run {session.run}, round {session.assignment.round})"
