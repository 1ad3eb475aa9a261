"""The coordinator's answers as plain objects: the keys of `-o json` stand here and nowhere else."""

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedcore.v1 import admin_pb2, operations_pb2

FINAL_STATES = frozenset({"DONE", "DEGRADED", "FAILED", "ABORTED"})


def run_document(run: "admin_pb2.Run") -> dict[str, Any]:
    """A run. `round` counts finished rounds; `missed` lists the rounds that missed an expected site."""
    return {
        "run": run.run,
        "name": run.name,
        "state": run.state,
        "round": run.round,
        "rounds": run.rounds,
        "sites": list(run.sites),
        "strategy": run.strategy,
        "phase": run.phase,
        "phase_since": run.phase_since or None,
        "reason": run.reason,
        "progress": [
            {
                "site": site.site,
                "stage": site.stage,
                "done": site.done,
                "total": site.total,
                "loss": site.loss,
                "images_per_s": site.images_per_s,
                "reason": site.reason,
            }
            for site in run.progress
        ],
        "missed": [{"round": missed.round, "sites": list(missed.sites)} for missed in run.missed],
        "best_round": run.best_round or None,
        "models_dropped": run.models_dropped or None,
        "submitted_at": run.submitted_at or None,
        "submitted_by": run.submitted_by or None,
        "finished_at": run.finished_at or None,
        "last_round": json.loads(run.last_round_json) if run.last_round_json else None,
    }


def plan_document(run: "admin_pb2.Run") -> dict[str, Any] | None:
    """The run's plan as the coordinator validated it."""
    plan: dict[str, Any] | None = json.loads(run.plan_json) if run.plan_json else None
    return plan


def site_document(site: "admin_pb2.Site") -> dict[str, Any]:
    """A site."""
    return {
        "site": site.id,
        "connected": site.connected,
        "enabled": site.enabled,
        # A coordinator of an earlier version says no more than whether it is enabled.
        "standing": site.standing or ("enabled" if site.enabled else "disabled"),
        "standing_since": site.standing_since or None,
        "standing_by": site.standing_by or None,
        "standing_reason": site.standing_reason or None,
        "activity": site.activity,
        "unavailable_reason": site.unavailable_reason,
        "last_seen": site.last_seen or None,
        "enrolled_at": site.enrolled_at or None,
        "certificate_not_after": site.certificate_not_after or None,
        "software_version": site.software_version,
        "device": site.device,
        "num_examples": site.num_examples,
    }


def model_document(model: "admin_pb2.Model") -> dict[str, Any]:
    """A model of a run, with its card (architecture, class names, transform, metrics). One that was dropped has no bytes."""
    return {
        "run": model.run,
        "round": model.round,
        "digest": model.digest,
        "bytes": None if model.dropped_at else model.payload_bytes,
        "best": model.best,
        "dropped_at": model.dropped_at or None,
        "dropped_reason": model.dropped_reason or None,
        "impressions_digest": model.impressions_digest or None,
        "card": json.loads(model.card_json) if model.card_json else None,
    }


def status_document(status: "admin_pb2.GetStatusReply") -> dict[str, Any]:
    """The coordinator's state, its sites and the runs that have not ended."""
    return {
        "federation": status.federation,
        "software_version": status.software_version,
        "uptime_s": status.uptime_s,
        "sites": [site_document(site) for site in status.sites],
        "active_runs": [run_document(run) for run in status.active_runs],
        "artifact_bytes": status.artifact_bytes,
        "free_bytes": status.free_bytes,
        "problems": list(status.problems),
    }


def health_document(reply: "operations_pb2.GetHealthReply") -> dict[str, Any]:
    """The coordinator's health: every fact with its figures."""
    return {
        "healthy": reply.healthy,
        "software_version": reply.software_version,
        "drain": drain_document(reply.drain),
        "facts": [
            {
                "check": fact.check,
                "subject": fact.subject,
                "healthy": fact.healthy,
                "says": fact.says,
                "hint": fact.hint,
                "figures": dict(sorted(fact.figures.items())),
            }
            for fact in reply.facts
        ],
    }


def drain_document(state: "operations_pb2.DrainState") -> dict[str, Any]:
    """Whether rounds are opened, and whether anything is under way."""
    return {
        "draining": state.draining,
        "quiet": state.quiet,
        "under_way": state.under_way,
        "since": state.since or None,
        "by": state.by or None,
        "reason": state.reason,
    }
