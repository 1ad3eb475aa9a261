from collections.abc import Iterator
from typing import Any

import pytest

from fedcore.errors import CallTimeoutError, NotFoundError, UnreachableError
from fedctl.admin import open_credential
from fedctl.following import LONGEST_PAUSE_S, follow_run


class Clock:
    """Time that passes by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def follow(lab: Any, clock: Clock, told: list[str], **options: Any) -> Iterator[Any]:
    with open_credential(lab.operator) as admin:
        yield from follow_run(admin, "blood", on_trouble=told.append, now=clock, sleep=clock.sleep, **options)


def test_goes_on_after_a_lost_connection_and_tells(lab: Any, make_run: Any) -> None:
    lab.script.watches = [[make_run(), None], [None], [make_run(round=2), make_run(state="DONE")]]
    clock, told = Clock(), []
    states = [(run.state, run.round) for run in follow(lab, clock, told)]
    assert states == [("RUNNING", 1), ("RUNNING", 2), ("DONE", 1)]
    assert [bool(text) for text in told] == [True, True, False]
    assert "trying again" in told[0]
    assert len(clock.pauses) == 2


def test_a_stream_that_ends_early_is_opened_again(lab: Any, make_run: Any) -> None:
    lab.script.watches = [[make_run()], [make_run(state="ABORTED")]]
    clock, told = Clock(), []
    assert [run.state for run in follow(lab, clock, told)] == ["RUNNING", "ABORTED"]


def test_pauses_grow_to_a_bound_and_it_gives_up(lab: Any, make_run: Any) -> None:
    lab.script.watches = [[make_run(), None], *[[None]] * 60]
    clock, told = Clock(), []
    with pytest.raises(UnreachableError, match="away for"):
        list(follow(lab, clock, told, give_up_s=100))
    assert max(clock.pauses) <= LONGEST_PAUSE_S
    assert clock.pauses[-1] > clock.pauses[0]
    assert 100 < clock.now < 100 + LONGEST_PAUSE_S


def test_no_coordinator_from_the_start_is_told_at_once(lab: Any) -> None:
    lab.script.watches = [[None]]
    with pytest.raises(UnreachableError):
        list(follow(lab, Clock(), []))


def test_what_is_not_there_is_not_tried_again(lab: Any) -> None:
    with pytest.raises(NotFoundError, match="no run 'blood'"):
        list(follow(lab, Clock(), []))


def test_the_time_limit_ends_it_between_streams(lab: Any, make_run: Any) -> None:
    lab.script.watches = [[make_run(), None], *[[None]] * 60]
    with pytest.raises(CallTimeoutError, match="has not ended within 30 s"):
        list(follow(lab, Clock(), [], timeout_s=30))
