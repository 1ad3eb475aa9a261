"""Whether operators let a site take part: its standing. Pure; the registry keeps it, the round machine goes by it."""

from dataclasses import dataclass
from enum import StrEnum

from fedserver.round_decisions import Withheld


class Standing(StrEnum):
    """What operators decided about a site."""

    # Runs may ask it.
    ENABLED = "enabled"
    # It finishes the work it has and gets none after that.
    DRAINING = "draining"
    # It is let go at once, and its agent is not served.
    DISABLED = "disabled"
    # As disabled, and for good: its certificates are revoked. It comes back by enrolling again.
    REMOVED = "removed"

    @property
    def served(self) -> bool:
        """Whether the site's agent may connect, fetch and deliver."""
        return self in (Standing.ENABLED, Standing.DRAINING)


@dataclass(frozen=True, slots=True)
class Decision:
    """A standing, who decided it when (RFC 3339), and why; all but the standing empty if it was always enabled."""

    standing: Standing = Standing.ENABLED
    since: str = ""
    by: str = ""
    reason: str = ""

    def __str__(self) -> str:
        """In words: disabled by operator admin since 2026-03-01T12:00:00Z: MRI upgrade."""
        who = f" by operator {self.by}" if self.by else ""
        since = f" since {self.since[:19]}Z" if self.since else ""
        return f"{self.standing}{who}{since}" + (f": {self.reason}" if self.reason else "")

    @property
    def withheld(self) -> Withheld | None:
        """What rounds make of it; None if the site may work."""
        if self.standing is Standing.ENABLED:
            return None
        return Withheld(str(self), at_once=not self.standing.served)
