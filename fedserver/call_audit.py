"""Calls as records of the audit log: who called what, from where, let in as what, on which object, with what result.

The interceptor opens a `CallRecord` for each call; handlers, who know more, name the object and add details with
`note`. Nothing is added to a stream's messages.
"""

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

import structlog

from fedcore.audit import OK, Fact, Value
from fedcore.audit_store import AuditLog
from fedcore.errors import (
    FedimpresError,
    IdentityError,
    InternalError,
    OverloadedError,
    PermissionDeniedError,
)
from fedserver.audit_policy import ACTIONS, UNKNOWN, Recorded, Rule

# Refusals of one caller and action: so many at once, then one in so many seconds; the rest are counted.
_REFUSALS_AT_ONCE = 20
_REFUSAL_EVERY_S = 10.0
_MAX_CALLERS = 4096
_log = structlog.get_logger("fedserver.audit")


@dataclass(slots=True)
class CallRecord:
    """What is known of the call under way. Filled in on its way through the edge, then by its handler."""

    method: str
    peer: str
    actor: str = "anyone"
    role: str = ""
    roles: frozenset[str] = frozenset()
    object: str = ""
    detail: dict[str, Value] = field(default_factory=dict)
    # Said by its handler: it changed nothing, so there is nothing to record.
    unchanged: bool = False

    @property
    def rule(self) -> Rule:
        """The method's row in the table."""
        return ACTIONS.get(self.method, UNKNOWN)

    def fact(self, result: str) -> Fact:
        """The call as a fact."""
        return Fact(
            self.rule.action, self.actor, self.role, self.peer, self.object, result, dict(self.detail)
        )


_CURRENT: ContextVar[CallRecord] = ContextVar("call_record")


def note(thing: str = "", **detail: Value) -> None:
    """Name the object of the call under way and add details, for its record. Outside a call it does nothing."""
    current = _CURRENT.get(None)
    if current is None:
        return
    current.object = thing or current.object
    current.detail.update(detail)


def nothing_changed() -> None:
    """Leave the call under way, if it succeeds, out of the log: it repeated what was recorded already."""
    current = _CURRENT.get(None)
    if current is not None:
        current.unchanged = True


def roles_of_call() -> frozenset[str]:
    """The roles of whoever makes the call under way. Raises InternalError outside a call."""
    current = _CURRENT.get(None)
    if current is None:
        raise InternalError("no call under way")
    return current.roles


class CallAudit:
    """Records calls. `monotonic` gives seconds."""

    def __init__(self, log: AuditLog, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._refusals = RefusalThrottle(monotonic)

    def open(self, method: str, peer: str) -> CallRecord:
        """Begin the record of a call, in the task that serves it."""
        record = CallRecord(method, peer)
        _CURRENT.set(record)
        return record

    async def before_stream(self, call: CallRecord) -> None:
        """Record a call whose first message is about to go out, if the table says so. Raises StorageError."""
        if call.rule.recorded is Recorded.BEFORE:
            await self._log.record(call.fact(OK))

    async def succeeded(self, call: CallRecord) -> None:
        """Record a call that is about to be answered, if the table says so. Raises StorageError."""
        if call.rule.recorded is Recorded.AFTER and not call.unchanged:
            await self._log.record(call.fact(OK))

    async def failed(self, call: CallRecord, error: Exception) -> bool:
        """Record a refusal, and the failure of a call that the table names. A log that can't be written is only told.

        False for one refusal of many, which are only counted.
        """
        refusal = isinstance(error, PermissionDeniedError | IdentityError | OverloadedError)
        if not refusal and call.rule.recorded is Recorded.NO:
            return True
        if refusal:
            unrecorded = self._refusals.admit(call.actor, call.rule.action)
            if unrecorded is None:
                return False
            if unrecorded:
                call.detail["refusals_not_recorded"] = unrecorded
        if isinstance(error, FedimpresError):
            code, call.detail["error"] = error.code, error.message
        else:
            code, call.detail["error"] = InternalError.code, type(error).__name__
        await self._try(call, call.fact(code))
        return True

    async def cancelled(self, call: CallRecord) -> None:
        """Record that the caller went away during a call that the table records afterwards."""
        if call.rule.recorded is Recorded.AFTER:
            await self._try(call, call.fact("cancelled"))

    async def _try(self, call: CallRecord, fact: Fact) -> None:
        try:
            await self._log.record(fact)
        except FedimpresError as failure:
            _log.error(
                "a call could not be recorded", method=call.method, actor=call.actor, error=str(failure)
            )


class RefusalThrottle:
    """Keeps a caller who is refused again and again from filling the log: token bucket by (caller, action).

    What passes tells how many did not.
    """

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def admit(self, actor: str, action: str) -> int | None:
        """None if this refusal is not recorded; else how many since the last record were not."""
        now = self._monotonic()
        bucket = self._buckets.pop((actor, action), None) or _Bucket(float(_REFUSALS_AT_ONCE), now)
        self._buckets[actor, action] = bucket  # the one used last is last
        if len(self._buckets) > _MAX_CALLERS:
            self._buckets.pop(next(iter(self._buckets)))
        left = bucket.left + (now - bucket.at) / _REFUSAL_EVERY_S
        bucket.left, bucket.at = min(float(_REFUSALS_AT_ONCE), left), now
        if bucket.left < 1:
            bucket.unrecorded += 1
            return None
        bucket.left -= 1
        unrecorded, bucket.unrecorded = bucket.unrecorded, 0
        return unrecorded


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float
    unrecorded: int = 0
