"""Calls that last: each is asked again, twice a second, whether its caller still counts, and ended if not.

TLS checks a certificate when a connection begins and never again, so a stream would outlive its certificate's end,
its revocation and its CA.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from fedcore.errors import FedimpresError
from fedcore.identity import Caller

T = TypeVar("T")
CHECK_EVERY_S = 0.5


@dataclass(slots=True, eq=False)
class _OpenCall:
    caller: Caller
    task: asyncio.Task[object]
    refusal: FedimpresError | None = None


class OpenCalls:
    """The streams that are open. `check` raises FedimpresError for a caller who no longer counts."""

    def __init__(self, check: Callable[[Caller], None], every_s: float = CHECK_EVERY_S) -> None:
        self._check = check
        self._every_s = every_s
        self._calls: set[_OpenCall] = set()
        self._sweeping: asyncio.Task[None] | None = None

    async def run(self, caller: Caller, answer: Callable[[], Awaitable[T]]) -> T:
        """Await `answer()` in this task, for as long as the caller counts.

        Raises what `check` raised once it does; `answer` has been cancelled and has cleaned up by then.
        """
        task = asyncio.current_task()
        assert task is not None, "within a task"
        call = _OpenCall(caller, task)
        self._calls.add(call)
        if self._sweeping is None:
            self._sweeping = asyncio.create_task(self._sweep())
        try:
            result = await answer()
        except asyncio.CancelledError:
            # Our own cancellation becomes the refusal; one from outside as well stays a cancellation.
            if call.refusal is None or task.uncancel() > 0:
                raise
            raise call.refusal from None
        else:
            if call.refusal is not None:  # `answer` took the cancellation for something else
                task.uncancel()
                raise call.refusal
            return result
        finally:
            self._calls.discard(call)
            if not self._calls and self._sweeping is not None:
                self._sweeping.cancel()
                self._sweeping = None

    async def _sweep(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            while True:
                await asyncio.sleep(self._every_s)
                for call in list(self._calls):
                    if call.refusal is None:
                        self._ask(call)

    def _ask(self, call: _OpenCall) -> None:
        try:
            self._check(call.caller)
        except FedimpresError as refusal:
            call.refusal = refusal
            call.task.cancel()
