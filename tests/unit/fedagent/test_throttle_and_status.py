"""The bandwidth limit on a clock set by hand, and what the agent writes of itself."""

import asyncio

import pytest

from fedagent.status_file import StatusBoard, read_status
from fedagent.throttle import Throttle, throttle_of
from fedcore.clock import ManualClock


def moved(chunks: list[int], bytes_per_s: float | None, idle_s: float = 0.0) -> float:
    """How long chunks take, `idle_s` of other work after each."""
    clock = ManualClock()

    async def sleep(seconds: float) -> None:
        clock.advance(seconds)

    async def story() -> None:
        throttle = Throttle(bytes_per_s, clock, sleep)
        for chunk in chunks:
            await throttle.passed(chunk)
            clock.advance(idle_s)

    asyncio.run(story())
    return clock.monotonic()


def test_the_average_is_held():
    assert moved([1000] * 10, 1000.0) == pytest.approx(10.0)
    assert moved([1, 9999], 1000.0) == pytest.approx(10.0)
    assert moved([1000] * 10, None) == 0.0


def test_a_slow_reader_saves_nothing_up():
    assert moved([1000] * 10, 1000.0, idle_s=5.0) == pytest.approx(10 * 6.0)


def test_both_directions_share_the_line():
    clock = ManualClock()
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def story() -> None:
        throttle = Throttle(1000.0, clock, sleep)
        await asyncio.gather(throttle.passed(1000), throttle.passed(1000))

    asyncio.run(story())
    assert sorted(slept) == [1.0, 2.0]


def test_megabits_are_decimal():
    assert throttle_of(8)._bytes_per_s == 1e6
    assert throttle_of(None)._bytes_per_s is None


def test_the_status_is_written_when_it_changes(tmp_path):
    path, told = tmp_path / "status.json", []
    board = StatusBoard(path, "ward-7", told.append)
    first = read_status(path)
    assert first is not None
    assert told == ["not connected: connecting; idle"]
    board.update(trouble="no route")
    board.update(trouble="no route")
    board.update(connected=True, trouble="", doing="train, round 3 of run blood-1")
    board.update(refusal="paused at the site")
    assert told[1:] == [
        "not connected: no route; idle",
        "connected; train, round 3 of run blood-1",
        "connected; paused at the site",
    ]
    last = read_status(path)
    assert last is not None
    assert last.connected
    assert last.since >= first.since


def test_a_status_that_is_damaged_or_not_there_is_none(tmp_path):
    assert read_status(tmp_path / "none") is None
    (tmp_path / "half").write_text('{"site": "w')
    assert read_status(tmp_path / "half") is None


def test_a_full_disk_does_not_end_the_agent(tmp_path):
    told = []
    board = StatusBoard(tmp_path / "no" / "status.json", "ward-7", told.append)
    board.update(connected=True)
    assert told[-1] == "connected; idle"
