"""Streams end when their caller no longer counts, and only then; with the reason, after their cleaning up."""

import asyncio
from datetime import UTC, datetime

import pytest

from fedcore.errors import IdentityError
from fedcore.identity import Caller
from fedserver.open_calls import OpenCalls

ANN = Caller("lab", "site", "a", "1", datetime(2030, 1, 1, tzinfo=UTC))
BOB = Caller("lab", "site", "b", "2", datetime(2030, 1, 1, tzinfo=UTC))


class World:
    def __init__(self) -> None:
        self.refused: set[str] = set()
        self.calls = OpenCalls(self.check, every_s=0.01)
        self.cleaned: list[str] = []
        self.over = asyncio.Event()

    def check(self, caller: Caller) -> None:
        if caller.id in self.refused:
            raise IdentityError(f"{caller}: revoked")

    async def stream(self, name: str) -> str:
        """Lasts until `over` is set."""
        try:
            await self.over.wait()
        finally:
            await asyncio.sleep(0)
            self.cleaned.append(name)
        return name


def test_only_the_refused_caller_is_ended_and_told_why():
    async def story() -> None:
        world = World()
        a = asyncio.create_task(world.calls.run(ANN, lambda: world.stream("a")))
        b = asyncio.create_task(world.calls.run(BOB, lambda: world.stream("b")))
        await asyncio.sleep(0.03)
        world.refused.add("a")
        with pytest.raises(IdentityError, match="site/a: revoked"):
            await asyncio.wait_for(a, 60)
        assert world.cleaned == ["a"]
        world.over.set()
        assert await b == "b"

    asyncio.run(story())


def test_a_cancellation_from_outside_stays_one():
    async def story() -> None:
        world = World()
        call = asyncio.create_task(world.calls.run(ANN, lambda: world.stream("a")))
        await asyncio.sleep(0.02)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert world.cleaned == ["a"]

    asyncio.run(story())


def test_an_answer_that_swallows_the_cancellation_is_refused_all_the_same():
    async def story() -> None:
        world = World()

        async def stubborn() -> str:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return "went on"
            return "never"

        world.refused.add("a")
        with pytest.raises(IdentityError):
            await asyncio.wait_for(world.calls.run(ANN, stubborn), 60)
        await asyncio.sleep(0.02)  # nothing is left that would cancel this

    asyncio.run(story())


def test_nothing_runs_while_no_stream_is_open():
    async def story() -> None:
        world = World()
        world.over.set()
        assert await world.calls.run(ANN, lambda: world.stream("a")) == "a"
        await asyncio.sleep(0.02)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert await world.calls.run(BOB, lambda: world.stream("b")) == "b"

    asyncio.run(story())
