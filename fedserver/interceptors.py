"""The edge that every call passes: telemetry > error translation > identity > authorisation > handler.

One interceptor for all four kinds of RPC. It wraps the handler once a call and adds nothing to a stream's
messages: response streams are written to the wire as the handler yields them, and what a generator raises on
the way is translated like everything else.
"""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import structlog

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.errors import FedimpresError, InternalError, ProtocolError
from fedcore.identity import Caller, caller_from_auth_context
from fedcore.status import to_status
from fedserver.authorisation import authorise, is_public
from fedserver.registry import utc_now

# isort: split
import grpc

Clock = Callable[[], datetime]
Handler = Callable[[Any, Any], Any]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]]

_log = structlog.get_logger("fedserver.rpc")
_CALLER: ContextVar[Caller] = ContextVar("caller")
# Refusals by these are our failures rather than the caller's: logged as errors, with the traceback.
_OURS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


def caller_of(context: Any) -> Caller:
    """Who makes the call that `context` belongs to; for handlers, in the task that serves the call.

    Raises InternalError in a method that is open to anyone, and outside a call.
    """
    caller = _CALLER.get(None)
    if caller is None:
        raise InternalError(f"no verified caller in this call ({type(context).__name__})")
    return caller


class EdgeInterceptor(grpc.aio.ServerInterceptor):
    """Lets a call through only for callers of `federation` that the authorisation table names."""

    def __init__(self, federation: str, clock: Clock = utc_now) -> None:
        self._federation = federation
        self._clock = clock

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        """Wrap the handler. A method that nobody serves is answered UNIMPLEMENTED by grpc."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        kind = f"{_kind(handler.request_streaming)}_{_kind(handler.response_streaming)}"
        behaviour: Handler = getattr(handler, kind)
        wrap = self._streaming if handler.response_streaming else self._unary
        make: Callable[..., grpc.RpcMethodHandler[Any, Any]] = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(wrap(method, behaviour), handler.request_deserializer, handler.response_serializer)

    def _unary(self, method: str, behaviour: Handler) -> Handler:
        async def call(request: Any, context: Any) -> Any:
            async def answer() -> Any:
                result = behaviour(request, context)
                return await result if inspect.isawaitable(result) else result

            return await self._guard(method, context, answer)

        return call

    def _streaming(self, method: str, behaviour: Handler) -> Handler:
        async def call(request: Any, context: Any) -> None:
            async def answer() -> None:
                result = behaviour(request, context)
                if inspect.isawaitable(result):
                    await result  # it wrote to the context itself
                    return
                async with aclosing(result):
                    async for message in result:
                        await context.write(message)

            await self._guard(method, context, answer)

        return call

    async def _guard(self, method: str, context: Any, answer: Callable[[], Awaitable[Any]]) -> Any:
        """Identify, authorise, answer; translate what is raised, and tell the log."""
        started = time.monotonic()
        caller = "anyone"
        try:
            if not is_public(method):
                known = caller_from_auth_context(context.auth_context(), self._federation, self._clock())
                caller = str(known)
                authorise(method, known)
                _CALLER.set(known)
            result = await answer()
        except asyncio.CancelledError:
            _log.debug("rpc cancelled", method=method, caller=caller, seconds=_since(started))
            raise
        except grpc.aio.AbortError:
            _log.info("rpc aborted by its handler", method=method, caller=caller, seconds=_since(started))
            raise
        except Exception as error:
            await _refuse(error, method, caller, context, started)
        else:
            _log.debug("rpc", method=method, caller=caller, code="OK", seconds=_since(started))
            return result


def edge_interceptors(federation: str, clock: Clock = utc_now) -> list[grpc.aio.ServerInterceptor]:
    """What a server of the coordinator is made with: `aio.server(interceptors=edge_interceptors(name))`."""
    return [EdgeInterceptor(federation, clock)]


async def _refuse(error: Exception, method: str, caller: str, context: Any, started: float) -> None:
    """End the call with the error's status. Always raises grpc's AbortError."""
    if isinstance(error, NotImplementedError):
        error = ProtocolError(f"{method.rpartition('.')[2]} is not served here")
    status, message, metadata = to_status(error)
    ours = status in _OURS
    # The log gets the error's own words, which may say more than the caller is told.
    words = str(error) if isinstance(error, FedimpresError) else f"{type(error).__name__}: {error}"
    (_log.error if ours else _log.info)(
        "rpc failed" if ours else "rpc refused",
        method=method,
        caller=caller,
        peer=context.peer(),
        code=status.name,
        error=words,
        seconds=_since(started),
        **({"exc_info": error} if ours else {}),
    )
    await context.abort(status, message, metadata)


def _kind(streaming: bool) -> str:
    return "stream" if streaming else "unary"


def _since(started: float) -> float:
    return round(time.monotonic() - started, 4)
