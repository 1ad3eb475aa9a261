"""Questions to agents: each answer finds the one who asked; silence, departure and crowds are told apart."""

import asyncio

import pytest

from fedcore.clock import ManualClock
from fedcore.errors import CallTimeoutError, OverloadedError, UnreachableError
from fedcore.v1 import federation_pb2
from fedserver.questions import answered, ask
from fedserver.roster import Roster, Session


def ping(number: int) -> federation_pb2.Directive:
    return federation_pb2.Directive(ping=federation_pb2.Ping(nonce=number))


def pong(number: int) -> federation_pb2.AgentMessage:
    return federation_pb2.AgentMessage(pong=federation_pb2.Pong(nonce=number))


async def sent(session: Session) -> int:
    directive = await session.outbox.get()
    assert directive is not None
    return directive.ping.nonce


def connect(clock: ManualClock) -> tuple[Roster, Session]:
    roster = Roster(clock, 9)
    return roster, roster.open("a", roster.greet("a", federation_pb2.Capabilities()))


def test_answers_find_their_questions_whatever_their_order() -> None:
    async def scenario() -> None:
        clock = ManualClock(5.0)
        _, session = connect(clock)
        first, second = (asyncio.create_task(ask(session, ping, 60, clock)) for _ in range(2))
        numbers = [await sent(session), await sent(session)]
        clock.advance(0.25)
        answered(session, 1 << 60, pong(1 << 60))  # nobody's
        answered(session, numbers[1], pong(numbers[1]))
        answered(session, numbers[1], pong(numbers[1]))  # twice
        message, seconds = await second
        assert (message.pong.nonce, seconds) == (numbers[1], 0.25)
        answered(session, numbers[0], pong(numbers[0]))
        assert (await first)[0].pong.nonce == numbers[0]
        assert session.asked == {}

    asyncio.run(scenario())


def test_silence_departure_and_too_many_questions_are_different_errors() -> None:
    async def scenario() -> None:
        clock = ManualClock()
        roster, session = connect(clock)
        with pytest.raises(CallTimeoutError, match="connected, but its agent gave no answer within 0.01 s"):
            await ask(session, ping, 0.01, clock)
        asked = [asyncio.create_task(ask(session, ping, 60, clock)) for _ in range(16)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await ask(session, ping, 60, clock)
        roster.close(session)
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(outcome, UnreachableError)
        assert session.asked == {}

    asyncio.run(scenario())
