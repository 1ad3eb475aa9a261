"""Artifacts that go: what no run needs when the coordinator starts, purged impressions, dropped models,
refused results."""

import time
from collections.abc import Iterable

import structlog

from fedcore.artifact_store import ArtifactStore
from fedserver import round_events as ev
from fedserver.impression_purges import purged_only
from fedserver.model_drops import dropped_only
from fedserver.round_state import RunState, needed

# An upload waits this long at most for the run that starts from it.
_GRACE_S = 24 * 3600.0
log = structlog.get_logger(__name__)


def sweep(store: ArtifactStore, states: Iterable[RunState], grace_s: float = _GRACE_S) -> int:
    """Delete artifacts that no run needs and that are older than `grace_s`; returns how many.

    They are what a crash left behind between two steps: updates of a round that was just over, say.
    """
    keep = {digest for state in states for digest in needed(state)}
    oldest = time.time() - grace_s
    swept = 0
    for digest in list(store.digests()):
        if digest not in keep and store.path(digest).stat().st_mtime < oldest:
            store.delete(digest)
            swept += 1
    if swept:
        log.info("swept artifacts that no run needs", count=swept)
    return swept


def erase_purged(store: ArtifactStore, states: Iterable[RunState]) -> None:
    """Delete the files of purged banks for good; also what a crash between journal and deletion, or a backup, left.

    A file that can't be deleted is only logged: whoever asked for the purge looks for it.
    """
    for digest in sorted(purged_only(states)):
        try:
            if store.erase(digest):
                log.info("purged impressions erased", digest=digest)
        except OSError as error:
            log.error("purged impressions can't be erased", digest=digest, error=str(error))


def erase_dropped(store: ArtifactStore, states: Iterable[RunState]) -> None:
    """Delete the files of dropped models that a crash between journal and deletion left.

    One that is younger than the drop stays: somebody has uploaded the same bytes since. One that can't be deleted is only
    logged: the next start tries again.
    """
    for digest, at in dropped_only(states).items():
        try:
            if digest in store and store.path(digest).stat().st_mtime <= at:
                store.delete(digest)
        except OSError as error:
            log.error("dropped model can't be deleted", digest=digest, error=str(error))


def drop_refused(store: ArtifactStore, event: ev.Event, states: Iterable[RunState]) -> None:
    """Delete the bank of a synthesis that a run refused: it was begun from one that was purged meanwhile, say."""
    digest = event.impressions if isinstance(event, ev.SynthesisFinished) else None
    if digest is not None and not any(digest in needed(state) for state in states):
        store.delete(digest)
