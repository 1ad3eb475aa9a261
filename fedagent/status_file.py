"""What the running agent last said of itself: `status.json` in its home, for `fedagent status` and for systemd.

Written whole and never synced: after a power cut the agent writes it anew. Whether the agent still runs, the home's
lock tells, not this file.
"""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fedcore.text import printable

_MAX_TEXT = 300


class AgentStatus(BaseModel):
    """`since` is when `connected` last changed; `trouble` why there is no connection; `refusal` why no work is taken."""

    model_config = ConfigDict(frozen=True)

    site: str
    connected: bool = False
    since: datetime
    trouble: str = ""
    refusal: str = ""
    doing: str = ""
    # Why the coordinator said last that it wants no work.
    told: str = ""

    def summary(self) -> str:
        """One line: connected, working on round 3 of blood-1."""
        link = "connected" if self.connected else f"not connected: {self.trouble or 'connecting'}"
        idle = f"idle ({self.told})" if self.told else "idle"
        return f"{link}; {self.refusal or self.doing or idle}"


class StatusBoard:
    """Keeps `status.json` current. `said` also gets each new summary."""

    def __init__(self, path: Path, site: str, said: Callable[[str], None] = lambda _: None) -> None:
        self._path = path
        self._said = said
        self._status = AgentStatus(site=site, since=datetime.now(UTC))
        self._write()

    @property
    def status(self) -> AgentStatus:
        """What was said last."""
        return self._status

    def update(self, **changes: Any) -> None:
        """Change fields; nothing is written if nothing differs."""
        texts = {k: printable(v, _MAX_TEXT) if isinstance(v, str) else v for k, v in changes.items()}
        if texts.get("connected", self._status.connected) != self._status.connected:
            texts["since"] = datetime.now(UTC)
        changed = self._status.model_copy(update=texts)
        if changed != self._status:
            self._status = changed
            self._write()

    def _write(self) -> None:
        staged = self._path.with_suffix(".tmp")
        try:
            staged.write_text(self._status.model_dump_json() + "\n")
            os.replace(staged, self._path)
        except OSError:
            pass  # A full disk must not end an agent that only wanted to say how it is.
        self._said(self._status.summary())


def read_status(path: Path) -> AgentStatus | None:
    """What the agent last said, None if it said nothing that can be read."""
    try:
        return AgentStatus.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        return None
