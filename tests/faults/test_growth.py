"""Whether the soak's judgement sees a leak, and no more than a leak."""

import json

import numpy as np
import pytest

from tests.faults.growth import growth
from tests.faults.soak import judge, report
from tests.faults.soak_plot import plot
from tests.faults.soak_samples import Life

# Half an hour, a sample every 5 s.
TIMES = np.arange(0, 1800, 5.0)


def noise(scale: float) -> np.ndarray:
    return np.random.default_rng(3).normal(0, scale, len(TIMES))


def test_a_straight_line_is_found_as_it_is():
    line = growth(TIMES, 100 + TIMES / 60)
    assert line is not None
    assert (line.warmup_s, line.seconds) == (300, 1495)
    assert line.slope_per_hour == pytest.approx(60)
    assert line.within_per_hour == pytest.approx(0, abs=1e-6)
    assert (line.total, line.hidden) == pytest.approx((1495 / 60, 1495 / 60))
    assert line.verdict == "rises"


@pytest.mark.parametrize("leak_mb_per_min", [0.2, -0.2, 1.0])
def test_a_small_leak_in_much_noise_is_found(leak_mb_per_min):
    line = growth(TIMES, 100 + leak_mb_per_min * TIMES / 60 + noise(3))
    assert line is not None
    assert not line.flat


def test_noise_is_flat_and_so_is_what_grows_less_than_the_floor():
    for values, floor in ((100 + noise(3), 0), (100 + TIMES / 1800, 0), (20 + TIMES / 1800, 1)):
        line = growth(TIMES, values, floor=floor)
        assert line is not None
        assert line.flat


def like_the_minute_before(scale: float, seed: int) -> np.ndarray:
    """Noise whose samples resemble those of the last minute, as memory does that follows the kind of run."""
    draw, kept = np.random.default_rng(seed), np.exp(-5 / 60)
    fresh = draw.normal(0, scale * np.sqrt(1 - kept**2), len(TIMES))
    found = [draw.normal(0, scale)]
    for change in fresh[1:]:
        found.append(kept * found[-1] + change)
    return np.array(found)


@pytest.mark.parametrize("leak_mb_per_min", [0.0, 0.2])
def test_the_interval_holds_the_true_slope_as_often_as_it_says(leak_mb_per_min):
    truth = 60 * leak_mb_per_min
    held = 0
    for seed in range(200):
        line = growth(TIMES, 100 + leak_mb_per_min * TIMES / 60 + like_the_minute_before(3, seed))
        assert line is not None
        held += abs(line.slope_per_hour - truth) <= line.within_per_hour
    assert held >= 184, "95 of 100, less what 200 draws leave to chance"


def test_noise_that_could_hide_a_leak_is_not_called_flat():
    line = growth(TIMES, 100 + like_the_minute_before(20, 1))
    assert line is not None
    assert line.verdict == "can't tell"
    assert line.hidden > 5
    assert not line.flat


def test_a_descriptor_in_ten_minutes_is_found():
    line = growth(TIMES, 20 + TIMES // 600, floor=1)
    assert line is not None
    assert not line.flat


def test_what_the_warm_up_takes_does_not_count():
    line = growth(TIMES, np.where(TIMES < 250, 50 + TIMES / 10, 100))
    assert line is not None
    assert line.flat


def test_of_a_short_life_nothing_is_said():
    assert growth([], []) is None
    assert growth(TIMES[:40], TIMES[:40]) is None


def life(role: str, pid: int, leak: float, upto: int = len(TIMES)) -> Life:
    times = TIMES[:upto]
    held = [100 + leak * t / 60 for t in times]
    return Life(role, pid, list(times), held, [20] * upto, [5] * upto)


class Stub:
    """What `report` reads of a soak."""

    def __init__(self, lives: list[Life]) -> None:
        self.minutes, self.broken = 30.0, []
        self.faults = [(5.0, "cut site-a")]
        self.rounds = [(1.0, 0.5), (2.0, 0.7)]
        self.runs = [{"run": "r", "plan": "noop", "state": "DONE", "rounds": 2}]
        self.sampler = self
        self.lives = {(one.role, one.pid): one for one in lives}
        self.disk = [{"seconds": 0.0, "coordinator": 1.0}, {"seconds": 1800.0, "coordinator": 9.0}]


@pytest.mark.parametrize(("leak", "flat"), [(0.0, True), (1.0, False)])
def test_the_report_names_the_process_that_grows_and_draws_it(tmp_path, leak, flat):
    lives = [life("coordinator", 1, 0.0), life("site-a", 2, leak), life("site-c", 3, 5.0, upto=100)]
    found = report(Stub(lives), 8, [])
    assert found["flat"] is flat
    assert [row["process"] for row in found["growth"] if not row["flat"]] == ["site-a"] * (not flat)
    assert {row["pid"] for row in judge(lives, 1800)} == {1, 2}, "site-c was killed too early to tell"
    assert (found["runs"], found["rounds"], found["states"]) == (1, 2, {"DONE": 1})
    picture = plot(json.loads(json.dumps(found)), tmp_path)
    assert picture.svg.stat().st_size > 10_000
    assert picture.png.read_bytes().startswith(b"\x89PNG")
