"""How often the driver looks at every site: with a thousand of them a look takes milliseconds, and they all have news.

Most facts are about one site, and only that one is looked at then. What time or a connection brings is found by a look at
everybody, a few times a second; and looks that nobody's round waits for take at most half of the time.
"""

import time
from collections.abc import Callable


class Looks:
    """When to look at everybody. Times are seconds."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._began = self._free_at = monotonic()
        self._owed = False

    def due(self, every_s: float) -> bool:
        """Whether the last look was so long ago, or one that was put off can be taken."""
        now = self._monotonic()
        return now - self._began >= every_s or (self._owed and now >= self._free_at)

    def put_off(self) -> bool:
        """Whether a look that is asked for now has to wait a little; it is due by itself then."""
        self._owed = self._owed or self._monotonic() < self._free_at
        return self._owed

    def patience_s(self, every_s: float) -> float:
        """How long to wait for news before the next look."""
        now = self._monotonic()
        next_at = self._free_at if self._owed else now + every_s
        return max(0.0, next_at - now)

    def begin(self) -> None:
        """A look begins."""
        self._began, self._owed = self._monotonic(), False

    def end(self) -> None:
        """It is over: the next one that is not urgent comes after a pause as long as this one took."""
        now = self._monotonic()
        self._free_at = now + (now - self._began)
