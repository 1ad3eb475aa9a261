"""The edge that every call passes: telemetry > error translation > audit > identity > authorisation > handler.

One interceptor for all four kinds of RPC. It wraps the handler once a call and adds nothing to a stream's
messages: response streams are written to the wire as the handler yields them, and what a generator raises on
the way is translated like everything else.
"""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, nullcontext
from contextvars import ContextVar
from datetime import datetime
from functools import partial
from typing import Any

import structlog

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.errors import FedimpresError, HeldError, InternalError, ProtocolError
from fedcore.identity import Caller, caller_from_auth_context, check_not_ended
from fedcore.raw_chunks import accepting_raw_chunks
from fedcore.status import to_status
from fedserver.authorisation import authorise, is_public
from fedserver.call_audit import CallAudit, CallRecord
from fedserver.limits import Limits
from fedserver.open_calls import OpenCalls
from fedserver.registry import utc_now

# isort: split
import grpc

Clock = Callable[[], datetime]
Check = Callable[[Caller], None]
RolesOf = Callable[[Caller], frozenset[str]]
Handler = Callable[[Any, Any], Any]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable["grpc.RpcMethodHandler[Any, Any] | None"]]

_log = structlog.get_logger("fedserver.rpc")
_HEALTH = "/grpc.health.v1."
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
    """Lets a call through only for callers of `federation` that the authorisation table names and whose certificate
    counts: `check_certificate` raises IdentityError for one that does not (unknown, revoked, of a dropped CA).

    `roles_of` says what a caller is let in as; `audit` records what the table of fedserver.audit_policy names, and
    every refusal; `limits` says how much one caller may ask for. Streams are asked again while they are open.
    `check_released` raises HeldError while nobody is served: health checks are answered all the same, and the refusals are
    not recorded.
    """

    def __init__(
        self,
        federation: str,
        check_certificate: Check,
        clock: Clock = utc_now,
        *,
        roles_of: RolesOf,
        audit: CallAudit,
        limits: Limits,
        check_released: Callable[[], None] = lambda: None,
    ) -> None:
        self._limits = limits
        self._check_released = check_released
        self._federation = federation
        self._check_certificate = check_certificate
        self._roles_of = roles_of
        self._audit = audit
        self._clock = clock
        self._open_calls = OpenCalls(self._check_still)

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
        lasting = bool(handler.request_streaming or handler.response_streaming)
        wrap = self._streaming if handler.response_streaming else partial(self._unary, lasting=lasting)
        make: Callable[..., grpc.RpcMethodHandler[Any, Any]] = getattr(grpc, f"{kind}_rpc_method_handler")
        serialise = accepting_raw_chunks(handler.response_serializer)
        return make(wrap(method, behaviour), handler.request_deserializer, serialise)

    def _unary(self, method: str, behaviour: Handler, *, lasting: bool) -> Handler:
        async def call(request: Any, context: Any) -> Any:
            async def answer(_: CallRecord) -> Any:
                result = behaviour(request, context)
                return await result if inspect.isawaitable(result) else result

            return await self._guard(method, context, answer, lasting=lasting)

        return call

    def _streaming(self, method: str, behaviour: Handler) -> Handler:
        async def call(request: Any, context: Any) -> None:
            async def answer(record: CallRecord) -> None:
                result = behaviour(request, context)
                if inspect.isawaitable(result):
                    await result  # it wrote to the context itself
                    return
                async with aclosing(result):
                    first = True
                    async for message in result:
                        if first:
                            await self._audit.before_stream(record)
                            first = False
                        await context.write(message)

            await self._guard(method, context, answer, lasting=True)

        return call

    def _check_still(self, caller: Caller) -> None:
        check_not_ended(caller, self._clock())
        self._check_certificate(caller)

    async def _guard(
        self, method: str, context: Any, handle: Callable[[CallRecord], Awaitable[Any]], *, lasting: bool
    ) -> Any:
        """Identify, authorise, answer, record; translate what is raised, and tell the log.

        A `lasting` call is ended when its caller's certificate no longer counts.
        """
        started = time.monotonic()
        caller = "anyone"
        record = self._audit.open(method, context.peer())
        answer: Callable[[], Awaitable[Any]] = partial(handle, record)
        try:
            if not method.startswith(_HEALTH):
                self._check_released()
            if not is_public(method):
                known = caller_from_auth_context(context.auth_context(), self._federation, self._clock())
                caller = record.actor = str(known)
                self._check_certificate(known)
                self._limits.called(caller)
                record.roles = self._roles_of(known)
                record.role = authorise(method, known, record.roles)
                _CALLER.set(known)
                if lasting:
                    answer = partial(self._open_calls.run, known, answer)
            with self._limits.open(caller, method) if lasting else nullcontext():
                result = await answer()
            await self._audit.succeeded(record)
        except asyncio.CancelledError:
            _log.debug("rpc cancelled", method=method, caller=caller, seconds=_since(started))
            await self._audit.cancelled(record)
            raise
        except grpc.aio.AbortError:
            _log.info("rpc aborted by its handler", method=method, caller=caller, seconds=_since(started))
            raise
        except Exception as error:
            if isinstance(error, NotImplementedError):
                error = ProtocolError(f"{method.rpartition('.')[2]} is not served here")
            held = isinstance(error, HeldError)
            recorded = False if held else await self._audit.failed(record, error)
            await _refuse(error, method, caller, context, started, quiet=not recorded)
        else:
            _log.debug("rpc", method=method, caller=caller, code="OK", seconds=_since(started))
            return result


def edge_interceptors(
    federation: str,
    check_certificate: Check,
    clock: Clock = utc_now,
    *,
    roles_of: RolesOf,
    audit: CallAudit,
    limits: Limits | None = None,
    check_released: Callable[[], None] = lambda: None,
) -> list[grpc.aio.ServerInterceptor]:
    """What a server of the coordinator is made with: `aio.server(interceptors=edge_interceptors(name, check))`."""
    return [
        EdgeInterceptor(
            federation,
            check_certificate,
            clock,
            roles_of=roles_of,
            audit=audit,
            limits=limits or Limits(),
            check_released=check_released,
        )
    ]


async def _refuse(
    error: Exception, method: str, caller: str, context: Any, started: float, *, quiet: bool
) -> None:
    """End the call with the error's status. Always raises grpc's AbortError. `quiet`: one of many of the same."""
    status, message, metadata = to_status(error)
    ours = status in _OURS
    # The log gets the error's own words, which may say more than the caller is told.
    words = str(error) if isinstance(error, FedimpresError) else f"{type(error).__name__}: {error}"
    (_log.error if ours else _log.debug if quiet else _log.info)(
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
