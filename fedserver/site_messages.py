"""Sites as operators see them: from registry, roster and runs to messages. Pure."""

from collections.abc import Iterable

from fedcore.v1 import admin_pb2
from fedserver.registry import SiteRow
from fedserver.roster import Roster
from fedserver.round_state import RunState
from fedserver.run_messages import activity
from fedserver.standing import Standing

DRAINED = "drained"


def site_message(row: SiteRow, roster: Roster, states: Iterable[RunState]) -> admin_pb2.Site:
    """Everything there is to say about a site. `states` are all runs'."""
    session, decision = roster.sessions.get(row.id), row.decision
    drained = decision.standing is Standing.DRAINING and not any(has_work(state, row.id) for state in states)
    site = admin_pb2.Site(
        id=row.id,
        connected=session is not None,
        enrolled_at=row.enrolled_at,
        certificate_not_after=row.certificate_not_after,
        last_seen=roster.last_seen(row.id) or row.last_seen,
        activity=activity(session),
        enabled=row.enabled,
        standing=DRAINED if drained else decision.standing.value,
        standing_since=decision.since,
        standing_by=decision.by,
        standing_reason=decision.reason,
    )
    if session is not None:
        site.software_version = session.capabilities.software_version
        site.device = session.capabilities.device_name or session.capabilities.device
        site.num_examples = session.capabilities.num_examples
        site.unavailable_reason = session.capabilities.unavailable_reason
    return site


def has_work(state: RunState, site: str) -> bool:
    """Whether the round under way still waits for a site, or will: for its update, then for its figures."""
    current = state.current
    return (
        current is not None
        and site in current.registered
        and site not in current.let_go
        and site not in current.rejected
        and site not in current.evaluations
        and site not in current.not_evaluated
    )


def runs_with(states: Iterable[RunState], site: str) -> list[RunState]:
    """Runs that have not ended and expect a site; those in the queue if their plan names it."""
    return [
        state
        for state in states
        if not state.status.final and site in (state.sites or state.plan.sites or ())
    ]
