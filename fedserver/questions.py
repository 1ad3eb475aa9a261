"""Questions to an agent over its directive stream: each answer finds the one who asked, by a number of its own."""

import asyncio
import secrets
from collections.abc import Callable

from fedcore.clock import Clock
from fedcore.errors import CallTimeoutError, OverloadedError, UnreachableError
from fedcore.v1 import federation_pb2
from fedserver.roster import Session

_MAX_AT_ONCE = 16


async def ask(
    session: Session, directive: Callable[[int], federation_pb2.Directive], timeout_s: float, clock: Clock
) -> tuple[federation_pb2.AgentMessage, float]:
    """Send `directive(number)`; the message that answers it, and after how many seconds it came.

    Raises UnreachableError if the agent leaves first, CallTimeoutError if it is connected and says nothing,
    OverloadedError while too many questions are open or the agent reads nothing.
    """
    if len(session.asked) >= _MAX_AT_ONCE:
        raise OverloadedError(f"site {session.site}: {_MAX_AT_ONCE} questions to its agent are open already")
    number = secrets.randbits(63) + 1
    answer: asyncio.Future[federation_pb2.AgentMessage] = asyncio.get_running_loop().create_future()
    session.asked[number] = answer
    began = clock.monotonic()
    try:
        if not session.send(directive(number)):
            raise OverloadedError(f"site {session.site}: its agent does not read what it is sent")
        async with asyncio.timeout(timeout_s):
            message = await answer
    except TimeoutError as error:
        raise CallTimeoutError(
            f"site {session.site}: connected, but its agent gave no answer within {timeout_s:g} s",
            hint="it may be suspended, or its line is slow; at the site: fedagent status, fedagent doctor",
        ) from error
    finally:
        del session.asked[number]
    if message.WhichOneof("message") is None:
        raise UnreachableError(f"site {session.site}: its agent left before it answered")
    return message, clock.monotonic() - began


def answered(session: Session, number: int, message: federation_pb2.AgentMessage) -> None:
    """Hand an answer to the one who asked; one that nobody waits for is dropped."""
    waiting = session.asked.get(number)
    if waiting is not None and not waiting.done():
        waiting.set_result(message)
