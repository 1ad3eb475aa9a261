"""`fedagent pause` and `resume`: a small file in the home, which the running agent obeys and a restart does not lift."""

import json
from datetime import datetime
from pathlib import Path

from fedcore.private_files import sync_folder, write_file
from fedcore.text import printable

_MAX_REASON = 200


def pause(path: Path, reason: str, now: datetime) -> None:
    """Keep this site from working until `resume`, restarts included. Raises OSError if the home can't be written."""
    said = {"since": now.isoformat(timespec="seconds"), "reason": printable(reason, _MAX_REASON)}
    write_file(path, json.dumps(said).encode() + b"\n")


def resume(path: Path) -> bool:
    """Let this site work again; False if it was not paused. Raises OSError if the home can't be written."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    sync_folder(path.parent)
    return True


def paused_reason(path: Path) -> str:
    """Why this site is paused, in words; empty if it is not.

    A file that is there and can't be read pauses too, one made with `touch` included.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError):
        return "paused at the site"
    try:
        said = json.loads(text)
        since, reason = printable(str(said["since"]), 40), printable(str(said["reason"]), _MAX_REASON)
    except (ValueError, TypeError, KeyError):
        return "paused at the site"
    return f"paused at the site since {since}" + (f": {reason}" if reason else "")
