"""Durations as people write them: "90", "15m", "1h30m", "2d"."""

import re

from fedcore.errors import UsageError

_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def parse_duration(text: str) -> float:
    """Seconds of a duration; a bare number is seconds. Raises UsageError unless it is positive and well-
    formed.
    """
    text = text.strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        seconds = float(text)
    elif re.fullmatch(rf"({_PART.pattern})+", text):
        seconds = sum(float(number) * _UNIT_S[unit] for number, unit in _PART.findall(text))
    else:
        raise UsageError(f"'{text}' is not a duration", hint="write it as 90s, 15m, 1h30m or 2d")
    if seconds <= 0:
        raise UsageError(f"'{text}' is not a positive duration", hint="write it as 90s, 15m, 1h30m or 2d")
    return seconds


def format_duration(seconds: float) -> str:
    """A duration in at most two units: "4.2 s", "3m 05s", "2h 10m", "3d 4h"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m {rest_s:02d}s"
    hours, rest_m = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h {rest_m:02d}m"
    return f"{hours // 24}d {hours % 24}h"


def format_bytes(count: float) -> str:
    """A number of bytes in a unit that reads well: "41.3 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
