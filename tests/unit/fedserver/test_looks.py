"""When the driver looks at every site."""

from fedcore.clock import ManualClock
from fedserver.looks import Looks

EVERY_S = 0.25


def look(looks: Looks, clock: ManualClock, takes_s: float) -> None:
    looks.begin()
    clock.advance(takes_s)
    looks.end()


def test_time_alone_brings_a_look() -> None:
    clock = ManualClock(10.0)
    looks = Looks(clock.monotonic)
    look(looks, clock, 0.01)
    assert looks.patience_s(EVERY_S) == EVERY_S
    clock.advance(0.2)
    assert not looks.due(EVERY_S)
    clock.advance(0.05)
    assert looks.due(EVERY_S), "from the beginning of the last one"


def test_a_look_that_nobody_waits_for_comes_after_a_pause_as_long_as_the_last_one_took() -> None:
    clock = ManualClock(10.0)
    looks = Looks(clock.monotonic)
    look(looks, clock, 0.02)
    assert looks.put_off(), "just looked"
    assert not looks.due(EVERY_S)
    assert 0.019 < looks.patience_s(EVERY_S) < 0.021
    clock.advance(0.03)
    assert looks.due(EVERY_S)
    look(looks, clock, 0.02)
    assert not looks.due(EVERY_S), "it was taken"


def test_with_few_sites_nothing_is_put_off() -> None:
    clock = ManualClock(10.0)
    looks = Looks(clock.monotonic)
    look(looks, clock, 0.0)
    assert not looks.put_off()
