"""Gives up models that a plan does not keep, and those that the storage quota has no room for."""

import asyncio
from dataclasses import dataclass, replace

import structlog

from fedcore.artifact_store import ArtifactStore
from fedcore.audit import Fact, Value
from fedcore.audit_store import AuditLog
from fedcore.errors import ConflictError, FedimpresError
from fedcore.text import ranges
from fedserver import round_events as ev
from fedserver.model_drops import ToDrop, fixed_bytes, given_up, to_free
from fedserver.round_driver import RoundDriver
from fedserver.round_state import RunState

# Looks follow changes of runs: not more often than the first, and sometimes without.
_PAUSE_S = 1.0
_IDLE_S = 60.0
# Models that go with one look: their files are deleted between other work of the control process.
_AT_ONCE = 50
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Usage:
    """What artifacts take, how much of it no drop would free, and what they may take; None without a quota."""

    used_bytes: int
    fixed_bytes: int
    quota_bytes: int | None

    @property
    def room_bytes(self) -> int | None:
        """What the quota leaves beside that which can't be dropped, negative if that is over it; None without one."""
        return None if self.quota_bytes is None else self.quota_bytes - self.fixed_bytes


class ModelKeeper:
    """Posts `ModelsDropped`; the driver journals it and deletes the files. `quota_bytes` is None for no quota."""

    def __init__(
        self, driver: RoundDriver, store: ArtifactStore, audit: AuditLog, quota_bytes: int | None
    ) -> None:
        self._driver = driver
        self._store = store
        self._audit = audit
        self._quota_bytes = quota_bytes
        self._full = False

    async def usage(self) -> Usage:
        """What artifacts take now."""
        return await asyncio.to_thread(self._usage, self._states())

    async def serve(self) -> None:
        """Look after every change, until cancelled. What fails is logged and tried again."""
        while True:
            seen = self._driver.changes
            try:
                await self.look()
            except (FedimpresError, OSError) as error:
                log.error("models can't be dropped", error=str(error))
            if self._driver.changes == seen:  # its own drops are changes too: there may be more to go
                await self._driver.wait_changed(_IDLE_S)
            await asyncio.sleep(_PAUSE_S)

    async def look(self) -> None:
        """Drop what is to go now, at most so much at a time. Raises StorageError."""
        for found in await asyncio.to_thread(_of_plans, self._states()):
            await self._drop(found)
        if self._quota_bytes is not None:
            for found in await asyncio.to_thread(self._over_quota, self._states(), self._quota_bytes):
                await self._drop(found)

    # In threads, as states never change: with thousands of finished rounds this takes its time.

    def _usage(self, states: list[RunState]) -> Usage:
        sizes = self._store.sizes()
        return Usage(sum(sizes.values()), fixed_bytes(states, sizes), self._quota_bytes)

    def _over_quota(self, states: list[RunState], quota_bytes: int) -> list[ToDrop]:
        sizes = self._store.sizes()
        found = to_free(states, sizes, quota_bytes, _AT_ONCE)
        full = not found and sum(sizes.values()) > quota_bytes
        if full and not self._full:
            log.warning(
                "artifacts stay over the storage quota: the rest can't be dropped", quota_bytes=quota_bytes
            )
        self._full = full
        return found

    async def _drop(self, found: ToDrop) -> None:
        """Audited before it is done: a crash in between leaves a record of what the next look does."""
        detail: dict[str, Value] = {
            "rounds": ranges(found.rounds),
            "models": len(found.rounds),
            "reason": found.reason,
        }
        fact = Fact("models.drop", "coordinator", object=f"run/{found.run}", detail=detail)
        await self._audit.record(fact)
        event = ev.ModelsDropped(at=self._driver.wall(), rounds=found.rounds, reason=found.reason)
        try:
            await self._driver.post(found.run, event)  # which logs it
        except ConflictError as error:
            log.info("models are needed after all", run=found.run, error=error.message)
            await self._audit.record(replace(fact, result=error.code))

    def _states(self) -> list[RunState]:
        return [view.state for view in self._driver.views()]


def _of_plans(states: list[RunState]) -> list[ToDrop]:
    return [found for state in states if (found := given_up(state)) is not None]
