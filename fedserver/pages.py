"""Long lists in pages: what fits in one message, and where the next page begins. Pure."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from fedcore.errors import ProtocolError

T = TypeVar("T")

_MAX_ITEMS = 500
# Half of what a message may have.
_MAX_BYTES = 4 << 20


def page(items: Iterable[tuple[str, T]], size_bytes: Callable[[T], int]) -> tuple[list[T], str]:
    """The first of `items` (each with the token that names it) that fit; and the token of the last, "" if none is left.

    A page holds at least one item, however large.
    """
    taken: list[T] = []
    total, last = 0, ""
    for token, item in items:
        total += size_bytes(item)
        if taken and (len(taken) == _MAX_ITEMS or total > _MAX_BYTES):
            return taken, last
        taken.append(item)
        last = token
    return taken, ""


def token_number(token: str) -> int:
    """The number that a token holds, 0 for none. Raises ProtocolError."""
    if token and not (token.isascii() and token.isdecimal() and len(token) <= 10):
        raise ProtocolError(
            f"page token {token!r:.80} is none of this coordinator's", hint="list from the start"
        )
    return int(token or 0)
