"""Turns at moving a chunk: bounds what transfers hold in memory, whatever their number, and serves them in order.

A peer that is slow to send or to read loses its turn to the others after a moment; its own transfer goes on.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

_PATIENCE_S = 1.0
# What is smaller waits for nobody: a thousand of them are as much memory as a few chunks, and a turn that waits for its peer
# keeps others waiting for as long as the line is.
SMALL_BYTES = 64 << 10


class Turns:
    """At most `limit` chunks move at a time; waiting streams are served first come, first served."""

    def __init__(self, limit: int, patience_s: float = _PATIENCE_S) -> None:
        self._free = asyncio.Semaphore(limit)
        self._patience_s = patience_s

    @asynccontextmanager
    async def turn(self, size: int) -> AsyncIterator[Callable[[], None]]:
        """Hold a turn for the body, which moves at most `size` bytes, or for `patience_s` if the body takes longer.

        The body may call what it is given once it no longer waits for the peer: it then holds its turn to the end, however
        slow this machine's disk is. Else each of a thousand senders would soon have a chunk waiting in memory.
        """
        if size <= SMALL_BYTES:
            yield lambda: None
            return
        await self._free.acquire()
        held = True

        def give_back() -> None:
            nonlocal held
            if held:
                held = False
                self._free.release()

        timer = asyncio.get_running_loop().call_later(self._patience_s, give_back)
        try:
            yield timer.cancel
        finally:
            timer.cancel()
            give_back()
