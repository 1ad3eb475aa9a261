"""Whether this site takes work now: the pause of its own people first, then what its policy says of the moment."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from fedagent.pause import paused_reason
from fedagent.policy import SitePolicy, refusal_now


class SiteGate:
    """Asked again and again while the agent runs; the pause file is read each time, the policy was read at the start."""

    def __init__(
        self, paused: Path, policy: SitePolicy, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._paused = paused
        self._policy = policy
        self._now = now

    def refusal(self, num_examples: int | None) -> str:
        """Why no work is taken now, in words; empty if it is. `num_examples` as in `refusal_now`."""
        return paused_reason(self._paused) or refusal_now(self._policy, self._now(), num_examples)
