"""What the global options and the environment say: read once, handed to every command."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Invocation:
    """Where the settings lie and which context was asked for (None: the current one)."""

    config_dir: Path
    context: str | None = None
