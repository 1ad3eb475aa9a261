"""Time as an argument: the system's clock, and one that tests set by hand."""

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds for decisions, wall-clock seconds since the epoch for records."""

    def monotonic(self) -> float:
        """Seconds that never go back."""
        ...

    def wall(self) -> float:
        """Seconds since the epoch."""
        ...


class SystemClock:
    """The clock of this machine."""

    def monotonic(self) -> float:
        """Seconds that never go back."""
        return time.monotonic()

    def wall(self) -> float:
        """Seconds since the epoch."""
        return time.time()


class ManualClock:
    """A clock that stands still until it is moved."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def advance(self, seconds: float) -> None:
        """Move on by `seconds`."""
        self._now += seconds

    def monotonic(self) -> float:
        """Seconds since the start."""
        return self._now

    def wall(self) -> float:
        """Seconds since the start, as if it had been the epoch."""
        return self._now
