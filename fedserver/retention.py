"""Artifacts that no run needs are swept when the coordinator starts."""

import time
from collections.abc import Iterable

import structlog

from fedcore.artifact_store import ArtifactStore
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
