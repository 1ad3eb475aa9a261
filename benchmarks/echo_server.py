"""A bare asyncio gRPC echo over the coordinator's own TLS: what a directive to all costs at the least. A helper of load.py.

echo_server.py CREDENTIAL PORT    a line of stdin "BYTES" sends a message of that size down every stream at once; answered,
                                  when all have come back, by a line of JSON: how long each took, in seconds
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedcore.channel import SERVER_OPTIONS, server_credentials
from fedcore.credential import load_credential

# isort: split
import grpc

METHOD = "/bare.Echo/Echo"


class Echo:
    """The open streams, and what has come back on them since the last message went out."""

    def __init__(self) -> None:
        self._streams: set[Any] = set()
        self._back: list[float] = []
        self._all_back = asyncio.Event()

    async def stream(self, messages: AsyncIterator[bytes], context: Any) -> None:
        """Serve one stream. The first message only says that it is there."""
        await anext(messages)
        self._streams.add(context)
        try:
            async for _ in messages:
                self._back.append(time.perf_counter())
                if len(self._back) >= len(self._streams):
                    self._all_back.set()
        finally:
            self._streams.discard(context)

    async def measure(self, size: int) -> list[float]:
        """Send to all; the seconds until each answered, sorted."""
        self._back.clear()
        self._all_back.clear()
        message = bytes(size)
        began = time.perf_counter()
        await asyncio.gather(*(stream.write(message) for stream in self._streams))
        await self._all_back.wait()
        return [back - began for back in self._back]


async def serve(folder: Path, port: int) -> None:
    """Serve until stdin ends."""
    echo = Echo()
    server = grpc.aio.server(options=SERVER_OPTIONS)
    handler = grpc.stream_stream_rpc_method_handler(echo.stream)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Echo", {"Echo": handler}),))
    credential = load_credential(folder, datetime.now(UTC))
    server.add_secure_port(
        f"127.0.0.1:{port}", server_credentials(credential, require_client_certificate=True)
    )
    await server.start()
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await echo.measure(int(line))), flush=True)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
