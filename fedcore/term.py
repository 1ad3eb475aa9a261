"""Terms of a coordinator: each restore from a backup begins a new one, and the newest counts.

A coordinator that was lost may come back after another one was restored in its place. Both hold valid keys; the term tells
them apart. See docs/adr/0006-terms.md.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from fedcore.errors import ProtocolError
from fedcore.v1 import federation_pb2

_MAX_NUMBER = 2**31


@dataclass(frozen=True, slots=True, order=True)
class Term:
    """A term; they are ordered. `began_ms` (since 1970) tells two restores of the same backup apart: the later counts."""

    number: int
    began_ms: int = 0

    def __str__(self) -> str:
        """With its beginning, for messages and logs."""
        if not self.began_ms:
            return f"term {self.number}"
        return f"term {self.number} (began {datetime.fromtimestamp(self.began_ms / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC)"


# Of a side that knows no term: a version before 1.1, or an agent that has not met its coordinator yet.
NO_TERM = Term(0)
# From the initialisation to the first restore.
FIRST_TERM = Term(1)


def term_to_proto(term: Term) -> federation_pb2.Term:
    """A term as it goes over the wire."""
    return federation_pb2.Term(number=term.number, began_unix_ms=term.began_ms)


def term_from_proto(message: federation_pb2.Term, who: str) -> Term:
    """A term that came over the wire; NO_TERM if it is unset. Raises ProtocolError."""
    if not message.number <= _MAX_NUMBER or not 0 <= message.began_unix_ms < 2**53:
        raise ProtocolError(f"{who}: {message.number}/{message.began_unix_ms} is not a term")
    return Term(message.number, message.began_unix_ms)
