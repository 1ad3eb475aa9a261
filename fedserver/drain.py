"""A drain: no round is opened, so that the coordinator can be stopped without undoing anybody's work.

It lives in memory and ends with the process: who drains means to stop, and what is started again should work.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from fedcore.v1 import federation_pb2


@dataclass(frozen=True, slots=True)
class Drain:
    """Who wants no further round to open, why, and since when."""

    by: str
    reason: str
    since: datetime

    @classmethod
    def begun(cls, by: str, reason: str, wall: float) -> "Drain":
        """A drain that begins now; `wall` is seconds since the epoch."""
        return cls(by, reason, datetime.fromtimestamp(wall, UTC))

    @property
    def since_text(self) -> str:
        """RFC 3339."""
        return self.since.isoformat(timespec="seconds")

    @property
    def says(self) -> str:
        """The drain in words."""
        why = f" ({self.reason})" if self.reason else ""
        return f"draining since {self.since_text}, by {self.by}{why}: no round is opened"

    def directive(self) -> federation_pb2.Directive:
        """What agents are told."""
        return federation_pb2.Directive(
            drain=federation_pb2.Drain(reason=self.reason or f"drained by {self.by}")
        )
