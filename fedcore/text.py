"""Text made fit to be sent, kept and shown: it may come from a file system, or from the other side of a connection."""

from collections.abc import Collection
from itertools import pairwise
from typing import Any


def printable(text: str, limit: int) -> str:
    """`text` as one line of at most `limit` characters, cut with an ellipsis.

    White space other than the blank becomes a blank; control characters, terminal escapes among them, go, and so does
    all else that `str.isprintable` rejects (marks that turn the direction of writing, say).
    """
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    if not cut.isprintable():
        cut = "".join(c if c.isprintable() else " " for c in cut if c.isprintable() or c.isspace())
    return cut.strip()


def wire_text(text: str, limit: int | None = None) -> str:
    """`text` as valid Unicode of at most `limit` characters.

    A byte that is no UTF-8, which Python's file functions give as a lone surrogate, is written out (`\\udcfc`).
    """
    safe = text.encode("utf-8", "backslashreplace").decode()
    return safe if limit is None or len(safe) <= limit else safe[: limit - 1] + "…"


def wire_value(value: Any) -> Any:
    """A JSON value, every text in it (keys too) as `wire_text` gives it."""
    if isinstance(value, str):
        return wire_text(value)
    if isinstance(value, list):
        return [wire_value(item) for item in value]
    if isinstance(value, dict):
        return {wire_text(key): wire_value(item) for key, item in value.items()}
    return value


def ranges(numbers: Collection[int]) -> str:
    """Numbers as people write them, "1-3, 7"; "none" if there are none."""
    ordered = sorted(numbers)
    if not ordered:
        return "none"
    starts = [ordered[0], *(b for a, b in pairwise(ordered) if b != a + 1)]
    ends = [*(a for a, b in pairwise(ordered) if b != a + 1), ordered[-1]]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
