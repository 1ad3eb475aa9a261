"""Text made fit to be sent, kept and shown: it may come from a file system, or from the other side of a connection."""

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
