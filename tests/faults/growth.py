"""Whether what a process holds grows: a straight line through its samples, and how sure its slope is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Samples a few seconds apart are not independent: a line is fitted to the means of minutes.
BLOCK_S = 60.0
# What a process takes at first (imports, pools, the allocator's arenas) is no leak.
WARMUP_SHARE, WARMUP_MAX_S = 0.25, 300.0
# Growth below this share of the mean, over the whole time looked at, is called flat however sure the slope is.
FLOOR_SHARE = 0.02
# The interval must say something: who could hide a rise of more than this share of the mean in it is not called flat.
HIDDEN_SHARE = 0.05
_FEWEST_BLOCKS = 4
# Beyond this correlation of one minute with the next, a life of half an hour can't tell noise from a slope.
_MOST_CORRELATED = 0.9


@dataclass(frozen=True)
class Growth:
    """A least-squares line over what came after the warm-up, with how sure its slope is. Slopes are per hour, in the
    samples' unit.
    """

    warmup_s: float
    seconds: float
    mean: float
    slope_per_hour: float
    # Half of the 95 % interval of the slope, which allows for minutes that are like those before.
    within_per_hour: float
    # In the samples' unit, over the time looked at.
    floor: float

    @property
    def total(self) -> float:
        """How much the line rises over the time looked at."""
        return self._over_all(self.slope_per_hour)

    @property
    def hidden(self) -> float:
        """The largest rise, or fall, over the time looked at that the interval does not rule out."""
        return abs(self.total) + self._over_all(self.within_per_hour)

    @property
    def verdict(self) -> str:
        """ "flat", "rises", "falls", or "can't tell" where the interval is too wide to say that it is flat."""
        negligible = abs(self.total) <= max(FLOOR_SHARE * self.mean, self.floor)
        if not (negligible or abs(self.slope_per_hour) <= self.within_per_hour):
            return "rises" if self.slope_per_hour > 0 else "falls"
        told = self.hidden <= max(HIDDEN_SHARE * self.mean, 2 * self.floor)
        return "flat" if told else "can't tell"

    @property
    def flat(self) -> bool:
        """Whether the slope is zero within an interval narrow enough to say so."""
        return self.verdict == "flat"

    def _over_all(self, per_hour: float) -> float:
        return per_hour * self.seconds / 3600


def growth(times_s: Sequence[float], values: Sequence[float], *, floor: float = 0.0) -> Growth | None:
    """The line through a process's samples; None if they are too few to say. Times rise."""
    if len(times_s) == 0:
        return None
    times, held = np.asarray(times_s, dtype=float), np.asarray(values, dtype=float)
    life_s = float(times[-1] - times[0])
    warmup_s = min(WARMUP_SHARE * life_s, WARMUP_MAX_S)
    late = times >= times[0] + warmup_s
    times, held = times[late], held[late]
    blocks = ((times - times[0]) // BLOCK_S).astype(int)
    xs = np.array([times[blocks == block].mean() for block in np.unique(blocks)])
    ys = np.array([held[blocks == block].mean() for block in np.unique(blocks)])
    if len(xs) < _FEWEST_BLOCKS:
        return None
    slope, within = _line(xs, ys)
    return Growth(
        warmup_s, float(times[-1] - times[0]), float(held.mean()), 3600 * slope, 3600 * within, floor
    )


def _line(xs: np.ndarray, ys: np.ndarray) -> tuple[float, float]:
    """Slope of the least-squares line, and half of its 95 % interval.

    A minute is like the one before, for a run lasts one or two: so many minutes say no more than a smaller number of
    independent ones would.
    """
    apart = xs - xs.mean()
    spread = float(apart @ apart)
    slope = float(apart @ ys) / spread
    residuals = ys - ys.mean() - slope * apart
    number = len(xs)
    error = float(np.sqrt(residuals @ residuals / (number - 2) / spread))
    correlated = _correlation(residuals)
    worth = (1 - correlated) / (1 + correlated)
    return slope, _student(max(1.0, number * worth - 2)) * error / float(np.sqrt(worth))


def _correlation(residuals: np.ndarray) -> float:
    """Of each residual with the next, not below 0; what a short series hides of it is added (Kendall 1954)."""
    power = float(residuals @ residuals)
    if power <= 1e-12 * len(residuals):
        return 0.0
    found = float(residuals[1:] @ residuals[:-1]) / power
    return min(max(0.0, found + (1 + 4 * found) / len(residuals)), _MOST_CORRELATED)


def _student(freedom: float) -> float:
    """The 97.5 % point of Student's t, within 3 % from two degrees of freedom on (Cornish and Fisher)."""
    return 1.96 + 2.37 / freedom + 2.82 / freedom**2 + 2.56 / freedom**3
