"""policy.toml's bandwidth: bytes in both directions wait until the line may carry them.

A leaky bucket: each chunk is let through as soon as those before it are paid for, so the average holds over any
stretch longer than one chunk (1 MiB), and a pause saves nothing up.
"""

import asyncio
from collections.abc import Awaitable, Callable

from fedcore.clock import Clock, SystemClock


class Throttle:
    """At most `bytes_per_s` on average; None lets everything through at once. One for all transfers of an agent."""

    def __init__(
        self,
        bytes_per_s: float | None,
        clock: Clock | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock or SystemClock()
        self._sleep = sleep
        self._free_at = 0.0

    async def passed(self, num_bytes: int) -> None:
        """Account for bytes that were or are about to be moved, and wait until the next may follow."""
        if self._bytes_per_s is None:
            return
        now = self._clock.monotonic()
        self._free_at = max(self._free_at, now) + num_bytes / self._bytes_per_s
        await self._sleep(self._free_at - now)


def throttle_of(mbit_s: float | None) -> Throttle:
    """The throttle for a policy's `bandwidth_mbit_s`."""
    return Throttle(None if mbit_s is None else mbit_s * 1e6 / 8)
