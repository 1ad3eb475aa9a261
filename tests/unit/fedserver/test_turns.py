"""Turns at moving a chunk: who waits for whom."""

import asyncio

import pytest

from fedserver.turns import SMALL_BYTES, Turns

LARGE = SMALL_BYTES + 1


def test_large_pieces_take_turns_and_small_ones_wait_for_nobody() -> None:
    async def story() -> None:
        turns = Turns(1, patience_s=60)
        async with turns.turn(LARGE):
            async with turns.turn(SMALL_BYTES), turns.turn(0):
                pass
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05), turns.turn(LARGE):
                    pass
        async with turns.turn(LARGE):
            pass

    asyncio.run(asyncio.wait_for(story(), 60))


def test_who_is_slow_loses_the_turn_and_goes_on() -> None:
    async def story() -> None:
        turns = Turns(1, patience_s=0.01)
        async with turns.turn(LARGE), turns.turn(LARGE):
            pass
        async with turns.turn(LARGE):  # given back once, not twice
            pass

    asyncio.run(asyncio.wait_for(story(), 60))


def test_who_has_its_chunk_keeps_the_turn_until_that_is_written() -> None:
    async def story() -> None:
        turns = Turns(1, patience_s=0.01)
        async with turns.turn(LARGE) as keep_turn:
            keep_turn()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1), turns.turn(LARGE):
                    pass
        async with turns.turn(LARGE):
            pass

    asyncio.run(asyncio.wait_for(story(), 60))
