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
_FEWEST_BLOCKS = 4


@dataclass(frozen=True)
class Growth:
    """A least-squares line over what came after the warm-up. Slopes are per hour, in the samples' unit."""

    warmup_s: float
    seconds: float
    mean: float
    slope_per_hour: float
    error_per_hour: float
    # In the samples' unit, over the time looked at.
    floor: float

    @property
    def total(self) -> float:
        """How much the line rises over the time looked at."""
        return self.slope_per_hour * self.seconds / 3600

    @property
    def tolerated(self) -> float:
        """The largest of two standard errors, `FLOOR_SHARE` of the mean, and the floor."""
        return max(2 * self.error_per_hour * self.seconds / 3600, FLOOR_SHARE * self.mean, self.floor)

    @property
    def flat(self) -> bool:
        """Whether the rise (or the fall) is within what is tolerated."""
        return abs(self.total) <= self.tolerated


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
    slope, error = _line(xs, ys)
    return Growth(
        warmup_s, float(times[-1] - times[0]), float(held.mean()), 3600 * slope, 3600 * error, floor
    )


def _line(xs: np.ndarray, ys: np.ndarray) -> tuple[float, float]:
    """Slope of the least-squares line, and its standard error."""
    apart = xs - xs.mean()
    spread = float(apart @ apart)
    slope = float(apart @ ys) / spread
    residuals = ys - ys.mean() - slope * apart
    return slope, float(np.sqrt(residuals @ residuals / (len(xs) - 2) / spread))
