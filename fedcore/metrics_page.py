"""A program's metrics as one page of text.

A registry of the program's own: nothing that another library registers is shown. Names follow Prometheus' conventions
(https://prometheus.io/docs/practices/naming/). The one label that grows with the federation is the site's id.
"""

import asyncio
from collections.abc import Awaitable, Callable

import prometheus_client
from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from fedcore.clock import Clock
from fedcore.version import software_version

# When each counter began says nothing here, and doubles their number.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
# A page this young is shown again: however often somebody asks, the program is looked at once in a second.
_FRESH_S = 1.0


def new_registry() -> CollectorRegistry:
    """An empty registry, but for the software's version and the process's memory, CPU time and descriptors."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    version = Gauge(
        "fedimpres_build_info", "The software that runs; always 1.", ["version"], registry=registry
    )
    version.labels(software_version()).set(1)
    return registry


class MetricsPage:
    """Called, it gives the page. `look` brings the registry's gauges up to date before."""

    def __init__(
        self, registry: CollectorRegistry, look: Callable[[], Awaitable[None]], clock: Clock
    ) -> None:
        self._registry = registry
        self._look = look
        self._clock = clock
        self._turn = asyncio.Lock()
        self._read_at = float("-inf")
        self._text = b""

    async def __call__(self) -> bytes:
        """The page, of this second. Raises what `look` raises."""
        async with self._turn:
            if self._clock.monotonic() - self._read_at >= _FRESH_S:
                await self._look()
                # In a thread: of a thousand sites it is long.
                self._text = await asyncio.to_thread(prometheus_client.generate_latest, self._registry)
                self._read_at = self._clock.monotonic()
            return self._text
