"""The last lines of this program's log, kept in memory for a debug bundle: no log file needs to be there."""

import json
from collections import deque
from collections.abc import MutableMapping
from typing import Any

import structlog

from fedcore.text import wire_text

_MAX_LINES = 2000
_MAX_CHARACTERS = 4000


class LogTail:
    """A structlog processor that keeps the newest lines as JSON, each cut to a bounded length."""

    def __init__(self, max_lines: int = _MAX_LINES) -> None:
        self._lines: deque[str] = deque(maxlen=max_lines)

    def __call__(self, logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Keep a line; it goes on to the log unchanged."""
        told = structlog.processors.format_exc_info(logger, method, dict(event))
        self._lines.append(wire_text(json.dumps(told, default=str, ensure_ascii=False), _MAX_CHARACTERS))
        return event

    def text(self) -> str:
        """The lines, the oldest first."""
        return "".join(f"{line}\n" for line in list(self._lines))
