"""The port at which Prometheus reads a program's metrics: on loopback only, and closed unless the configuration opens it.

A few lines of HTTP/1.1 in the program's own loop: one path, one answer a connection, bounded in size, time and number,
so that whoever asks can't keep the program from its work.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import structlog
from pydantic import Field

from fedcore.config import ConfigSection
from fedcore.errors import ConfigError

HOST = "127.0.0.1"
_MAX_HEAD_BYTES = 8192
_MAX_CONNECTIONS = 8
_PATIENCE_S = 10.0
_PLAIN = "text/plain; charset=utf-8"
# The text format, which every Prometheus reads.
_METRICS = "text/plain; version=0.0.4; charset=utf-8"
log = structlog.get_logger(__name__)

Page = Callable[[], Awaitable[bytes]]


class MetricsConfig(ConfigSection):
    """Without `port` there are no metrics."""

    port: int | None = Field(None, ge=1, le=65535)


@contextlib.asynccontextmanager
async def metrics_port(port: int | None, page: Page | None) -> AsyncIterator[None]:
    """Answer `GET /metrics` with `page` on 127.0.0.1 while the body runs; without a port or a page, do nothing.

    Raises ConfigError if the port is taken.
    """
    if port is None or page is None:
        yield
        return
    answering = _Answering(page)
    try:
        server = await asyncio.start_server(answering.connected, HOST, port, limit=_MAX_HEAD_BYTES)
    except OSError as error:
        raise ConfigError(
            f"can't listen on {HOST}:{port} for metrics: {error.strerror}",
            hint="stop the other program, or change port of [metrics]",
        ) from error
    log.info("metrics are shown", address=f"http://{HOST}:{port}/metrics")
    try:
        yield
    finally:
        server.close()
        await answering.end()


class _Answering:
    """The connections that are open."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._open: set[asyncio.Task[None]] = set()

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer a new connection, or close it if too many are open."""
        if len(self._open) >= _MAX_CONNECTIONS:
            writer.close()
            return
        task = asyncio.create_task(self._answer(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def end(self) -> None:
        """Close all connections."""
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_S):
                head = await reader.readuntil(b"\r\n\r\n")
                status, kind, body = await self._respond(head.split(b"\r\n", 1)[0])
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
                    "Connection: close\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            log.debug("no metrics for a connection", error=str(error))
        finally:
            writer.close()

    async def _respond(self, request: bytes) -> tuple[str, str, bytes]:
        """Status, content type and body for a request's first line."""
        method, _, rest = request.partition(b" ")
        if method != b"GET":
            return "405 Method Not Allowed", _PLAIN, b"only GET\n"
        if rest.partition(b" ")[0].partition(b"?")[0] != b"/metrics":
            return "404 Not Found", _PLAIN, b"only /metrics\n"
        try:
            return "200 OK", _METRICS, await self._page()
        except Exception:
            log.exception("metrics can't be read")
            return "500 Internal Server Error", _PLAIN, b"see the program's log\n"
