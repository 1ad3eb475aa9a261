"""Which banks of impressions a run has, and what a purge makes of its state. Pure.

A bank is what one round made. A purge is a fact of the run, so a replayed journal knows that the digests it names are
gone: nothing needs them any more, and a run under way goes on without a bank until its next one is made.
"""

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime

from fedcore.errors import ConflictError, NotFoundError
from fedserver import round_events as ev
from fedserver.round_state import Confirmation, Purge, RunState, Status, with_item


def banks(state: RunState) -> dict[int, str]:
    """Digest of the bank that each round made, purged ones included, oldest first; rounds without one are left out."""
    found = {record.round: record.impressions_digest for record in state.records if record.impressions_digest}
    current = state.current
    if current is not None and current.new_impressions is not None:
        found[current.number] = current.new_impressions
    for purge in state.purges:  # the record of a round in whose course its bank was purged names none
        found |= dict(zip(purge.rounds, purge.digests, strict=True))
    return dict(sorted(found.items()))


def kept(state: RunState) -> dict[int, str]:
    """The same, of banks that were not purged."""
    return {number: digest for number, digest in banks(state).items() if state.purge_of(number) is None}


def in_use(state: RunState) -> set[str]:
    """Digests of banks that the run trains on now, or will in its next round."""
    if state.status.final:
        return set()
    made = state.current.new_impressions if state.current is not None else None
    return {digest for digest in (state.impressions, made) if digest}


def under_way(state: RunState) -> bool:
    """Whether a round may be in progress or begin at any moment: a purge of what the run uses takes force then."""
    return not state.status.final and state.status is not Status.PAUSED


def purged_only(states: Iterable[RunState]) -> set[str]:
    """Digests that were purged and that no run has made anew since: their files must not be there."""
    states = tuple(states)
    gone = {digest for state in states for purge in state.purges for digest in purge.digests}
    for state in states:
        gone -= set(kept(state).values()) | in_use(state)
    return gone


def unconfirmed(state: RunState, site: str) -> list[Purge]:
    """Purges that a site has still to carry out."""
    return [purge for purge in state.purges if site in purge.sites and site not in purge.confirmed]


def raise_if_purged(states: Iterable[RunState], digest: str) -> None:
    """Raise NotFoundError that says when, by whom and why a bank was purged, if it was; return if not."""
    for state in states:
        for purge in state.purges:
            if digest in purge.digests:
                number = purge.rounds[purge.digests.index(digest)]
                raise NotFoundError(
                    f"impressions {digest} (run {state.run}, round {number}) were purged at {rfc3339_s(purge.at)}"
                    f" by {purge.by}: {purge.reason}",
                    hint=f"`fedctl impression show {state.run} --round {number}` says which sites confirmed it",
                )


def rfc3339_s(at: float) -> str:
    """Seconds since the epoch as people read them."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def apply_purge(state: RunState, event: ev.ImpressionsPurged | ev.PurgeConfirmed) -> RunState:
    """The state after a purge, or after a site's word that it carried it out.

    Raises ConflictError for banks that the run has not, or no longer, and for a word that was not awaited.
    """
    if isinstance(event, ev.PurgeConfirmed):
        return _confirmed(state, event)
    stored = kept(state)
    if not event.rounds or any(stored.get(r) != d for r, d in zip(event.rounds, event.digests, strict=True)):
        raise ConflictError(f"run {state.run}: the impressions to purge are not those that it has")
    purge = Purge(event.purge, event.at, event.by, event.reason, event.rounds, event.digests, event.sites)
    current, gone = state.current, set(event.digests)
    if current is not None and current.new_impressions in gone:
        note = f"purged by {event.by}: {event.reason}"
        current = replace(current, synthesised=(0, note), new_impressions=None)
    return replace(
        state,
        purges=(*state.purges, purge),
        current=current,
        impressions=None if state.impressions in gone else state.impressions,
        stragglers={s: asked for s, asked in state.stragglers.items() if asked.impressions not in gone},
    )


def _confirmed(state: RunState, event: ev.PurgeConfirmed) -> RunState:
    awaited = [purge for purge in unconfirmed(state, event.site) if purge.id == event.purge]
    if not awaited:
        raise ConflictError(f"run {state.run}: no purge {event.purge!r:.40} awaits {event.site}")
    said = Confirmation(event.at, event.deleted, event.audit_head)
    purges = tuple(
        replace(purge, confirmed=with_item(purge.confirmed, event.site, said)) if purge in awaited else purge
        for purge in state.purges
    )
    return replace(state, purges=purges)
