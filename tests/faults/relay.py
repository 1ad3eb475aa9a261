"""A site's line to the coordinator: a TCP relay that can be cut, held, slowed, silenced, or left half open."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, TypeVar

T = TypeVar("T")
Direction = Literal["up", "down"]

_PIECE_BYTES = 64 << 10


class Relay:
    """Listens on `port` of the loopback interface until it is closed; carries everything to `upstream_port`.

    Methods may be called from any thread; they have taken effect when they return. "up" is from the site to the coordinator.
    """

    def __init__(self, upstream_port: int) -> None:
        self.port = 0
        self._upstream_port = upstream_port
        self._loop = asyncio.new_event_loop()
        self._moved = asyncio.Condition()
        # What may still be carried, by direction; None: all that comes.
        self._left: dict[Direction, int | None] = {"up": None, "down": None}
        self._silent = False
        self._refusing = False
        self._bytes_per_s: float | None = None
        self._delay_s = 0.0
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        # The coordinator's ends of connections whose other end is gone: it has not heard of that.
        self._half_open: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None]] = set()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="relay", daemon=True)
        self._thread.start()
        ready.wait()

    # -- faults ---------------------------------------------------------------------------------

    def cut(self) -> None:
        """Reset all connections, both ends. New ones are carried."""
        self._do(self._cut)

    def half_open(self) -> None:
        """The site loses its connections; the coordinator hears nothing of that."""

        def leave() -> None:
            for site, coordinator in list(self._pairs):
                self._half_open.add(coordinator)
                site.transport.abort()

        self._do(leave)

    def silence(self) -> None:
        """Carry nothing, and tell nobody: a partition. New connections come to nothing either."""
        self._do(lambda: setattr(self, "_silent", True))

    def refuse(self) -> None:
        """Reset all connections and all that come: the site's uplink is down."""

        def down() -> None:
            self._refusing = True
            self._cut()

        self._do(down)

    def hold_after(self, direction: Direction, num_bytes: int) -> None:
        """Carry so many bytes more in this direction, and then none, over whatever connections."""
        self._do(lambda: self._left.update({direction: num_bytes}))

    def slow(self, bytes_per_s: float, delay_s: float) -> None:
        """Carry at this rate, each piece later by `delay_s`."""

        def slow() -> None:
            self._bytes_per_s, self._delay_s = bytes_per_s, delay_s

        self._do(slow)

    def heal(self) -> None:
        """Carry everything again; what was held comes through."""

        def heal() -> None:
            self._left = {"up": None, "down": None}
            self._silent = self._refusing = False
            self._bytes_per_s, self._delay_s = None, 0.0
            for coordinator in self._half_open:
                coordinator.transport.abort()
            self._half_open.clear()

        self._do(heal)

    def close(self) -> None:
        """End all connections and the listener."""

        async def end() -> None:
            self._cut()
            self._loop.call_soon(self._loop.stop)

        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(end(), self._loop)
            self._thread.join(10)

    # -- the loop -------------------------------------------------------------------------------

    def _do(self, change: Callable[[], T]) -> T:
        async def act() -> T:
            result = change()
            async with self._moved:
                self._moved.notify_all()
            return result

        return asyncio.run_coroutine_threadsafe(act(), self._loop).result(10)

    def _cut(self) -> None:
        for pair in list(self._pairs):
            for end in pair:
                end.transport.abort()
        for coordinator in self._half_open:
            coordinator.transport.abort()
        self._half_open.clear()

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)

        async def begin() -> asyncio.Server:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_PIECE_BYTES)
            self.port = server.sockets[0].getsockname()[1]
            return server

        server = self._loop.run_until_complete(begin())
        ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, site: asyncio.StreamWriter) -> None:
        if self._refusing:
            site.transport.abort()
            return
        try:
            await self._pass("up", 0)
            coordinator_reader, coordinator = await asyncio.open_connection(
                "127.0.0.1", self._upstream_port, limit=_PIECE_BYTES
            )
        except (OSError, asyncio.CancelledError):
            site.transport.abort()
            return
        pair = (site, coordinator)
        self._pairs.add(pair)
        pumps = [
            asyncio.create_task(self._carry("up", reader, coordinator)),
            asyncio.create_task(self._carry("down", coordinator_reader, site)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            pass
        finally:
            self._pairs.discard(pair)
            for pump in pumps:
                pump.cancel()
            site.transport.abort()
            if coordinator not in self._half_open:
                coordinator.transport.abort()

    async def _carry(
        self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            while piece := await reader.read(_PIECE_BYTES):
                await self._pass(direction, len(piece))
                writer.write(piece)
                await writer.drain()

    async def _pass(self, direction: Direction, num_bytes: int) -> None:
        """Return when so many bytes may go."""
        async with self._moved:
            await self._moved.wait_for(lambda: not self._silent and self._left[direction] != 0)
        left = self._left[direction]
        if left is not None:
            self._left[direction] = max(0, left - num_bytes)
        if self._delay_s or self._bytes_per_s:
            await asyncio.sleep(self._delay_s + num_bytes / (self._bytes_per_s or float("inf")))
