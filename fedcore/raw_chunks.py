"""Chunks of tensors that go to the wire without a protobuf message in between.

A message holds its bytes twice before they are sent (set, then serialised), in memory taken anew for each chunk: for
1 MiB that costs far more processor time than the copy itself. A `RawChunk` is written as what the message would be,
byte for byte, with one copy. Receivers see ordinary messages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# A stream's `oneof part` holds its chunk as field 2 (ArtifactPart, DeliverPart); Chunk: offset = 1, data = 2.
_PART_CHUNK, _OFFSET, _DATA = b"\x12", b"\x08", b"\x12"


@dataclass(frozen=True, slots=True)
class RawChunk:
    """A `Chunk` as part of an ArtifactPart or a DeliverPart. `offset` counts from the payload's start."""

    offset: int
    data: bytes

    def to_wire(self) -> bytes:
        """The part's serialised form: `ArtifactPart(chunk=Chunk(offset=..., data=...)).SerializeToString()`."""
        offset = _OFFSET + _varint(self.offset) if self.offset else b""
        head = offset + _DATA + _varint(len(self.data)) if self.data else offset
        return b"".join((_PART_CHUNK, _varint(len(head) + len(self.data)), head, self.data))


def accepting_raw_chunks(serialise: Callable[[Any], bytes] | None) -> Callable[[Any], bytes] | None:
    """A serialiser of messages that takes a `RawChunk` in the place of one."""
    if serialise is None:
        return None

    def to_wire(message: Any) -> bytes:
        return message.to_wire() if isinstance(message, RawChunk) else serialise(message)

    return to_wire


def _varint(number: int) -> bytes:
    """A number of at least 0 in protobuf's variable length."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)
