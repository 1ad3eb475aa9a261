"""The agent's own log as an operator may ask for it: the last lines, if the site's policy shares them.

A ring in memory keeps what the control process logged. Of each line it keeps the text, which is always a literal of our
code (a test holds that), and the fields named here, which can't hold a secret, an image's name or a label. Errors, reasons
and the like can; they stay at the site, and the line says which fields were left out.
"""

from collections import deque
from collections.abc import MutableMapping
from typing import Any

from fedagent.policy import SitePolicy
from fedcore.text import printable
from fedcore.v1 import federation_pb2

MAX_LINES = 1000
_MAX_TEXT = 200
# Numbers, identifiers of the federation's, names of our own. `code` is an error's class.
SHARED_FIELDS = frozenset(
    {
        "again_in_s", "asked_by", "code", "coordinator", "digest", "ended", "evaluating", "federation", "in_s",
        "kind", "module", "number", "outcome", "pid", "recalibrating", "replaced", "round", "run", "site", "until",
    }
)  # fmt: skip


class LogRing:
    """A structlog processor that keeps the last lines, cut to what may be shared."""

    def __init__(self, max_lines: int = MAX_LINES) -> None:
        # As they go over the wire: a message takes 1.6 kB, its bytes a tenth, and lines come by for as long as it serves.
        self._lines: deque[bytes] = deque(maxlen=max_lines)

    def __call__(self, _: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Keep a line; it goes on to the log unchanged."""
        kept = {key: printable(str(event[key]), _MAX_TEXT) for key in sorted(SHARED_FIELDS & event.keys())}
        left_out = sorted(event.keys() - SHARED_FIELDS - {"at", "level", "event"})
        if left_out:
            kept["left_out"] = printable(", ".join(left_out), _MAX_TEXT)
        self._lines.append(
            federation_pb2.LogLine(
                at=str(event.get("at", "")),
                level=str(event.get("level", "")),
                event=printable(str(event.get("event", "")), _MAX_TEXT),
                fields=kept,
            ).SerializeToString()
        )
        return event

    def last(self, lines: int) -> list[federation_pb2.LogLine]:
        """The last lines, the oldest first."""
        newest = list(self._lines)[-lines:] if lines > 0 else []
        return [federation_pb2.LogLine.FromString(line) for line in newest]


class SharedLog:
    """Answers the coordinator's ReadLog as the site's policy says."""

    def __init__(self, ring: LogRing, policy: SitePolicy) -> None:
        self._ring = ring
        self._policy = policy

    def answer(self, asked: federation_pb2.ReadLog) -> federation_pb2.LogLines:
        """The lines, or why there are none."""
        if not self._policy.share_logs:
            refusal = "refuses: policy does not share the agent's log"
            return federation_pb2.LogLines(nonce=asked.nonce, asked_by=asked.asked_by, refusal=refusal)
        lines = self._ring.last(asked.lines)
        return federation_pb2.LogLines(nonce=asked.nonce, asked_by=asked.asked_by, lines=lines)
