"""grpc.health.v1: what the coordinator says about each of its services.

The program sets it, nothing is assumed.

Each check's initial metadata name the coordinator's clock, protocol and version, for `fedagent doctor`.

Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from grpc_health.v1 import health_pb2

from fedcore.errors import NotFoundError
from fedcore.protocol import PROTOCOL, PROTOCOL_KEY, TIME_KEY, VERSION_KEY
from fedcore.version import software_version

_Response = health_pb2.HealthCheckResponse


class HealthService:
    """Servicer of grpc.health.v1.Health for grpc.aio; give it to `add_HealthServicer_to_server`.

    The empty name stands for the coordinator as a whole: serving if all named services are.
    """

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._changed = asyncio.Event()

    def set(self, service: str, serving: bool) -> None:
        """Say whether a service is able to work. Call from the event loop's thread."""
        if not service:
            raise ValueError("the whole's health follows from its services")
        if self._serving.get(service) is serving:
            return
        self._serving[service] = serving
        # Watchers hold the old event: each change wakes them all once.
        self._changed.set()
        self._changed = asyncio.Event()

    def services(self) -> dict[str, bool]:
        """Each service, and whether it serves."""
        return dict(self._serving)

    def shut_down(self) -> None:
        """Say of every service that it no longer serves: the coordinator is about to stop."""
        for service in list(self._serving):
            self.set(service, False)

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The state of one service. Raises NotFoundError for a name that was never set."""
        await context.send_initial_metadata(
            (
                (TIME_KEY, f"{time.time():.3f}"),
                (PROTOCOL_KEY, f"{PROTOCOL.major}.{PROTOCOL.minor}"),
                (VERSION_KEY, software_version()),
            )
        )
        status = self._status(request.service)
        if status == _Response.SERVICE_UNKNOWN:
            raise NotFoundError(f"no service {request.service!r:.120} here")
        return _Response(status=status)

    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The states of all services, the whole included."""
        return health_pb2.HealthListResponse(
            statuses={name: _Response(status=self._status(name)) for name in ("", *self._serving)}
        )

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """The state of one service, now and after every change; SERVICE_UNKNOWN until its name is set."""
        last = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != last:
                yield _Response(status=status)
                last = status
            await changed.wait()

    def _status(self, service: str) -> int:
        if not service:
            healthy = bool(self._serving) and all(self._serving.values())
        elif service in self._serving:
            healthy = self._serving[service]
        else:
            return int(_Response.SERVICE_UNKNOWN)
        return int(_Response.SERVING if healthy else _Response.NOT_SERVING)
