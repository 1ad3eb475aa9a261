"""The audit log as a chain of hashes: who did what to what, from where, with what result. Pure: no file, no clock.

A record's digest is the SHA-256 of its body, canonical JSON that includes the digest of the record before it. So a
record that was edited, removed or moved breaks the chain there. A cut tail leaves a chain that is whole: it is found by
a head (the sequence number and digest of the last record) that somebody else has kept.

Source of the construction: Schneier and Kelsey, "Secure Audit Logs to Support Computer Forensics", 1999, section 4.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedcore.parsing import parse_json
from fedcore.text import printable

GENESIS = "0" * 64
OK = "ok"
_MAX_TEXT = 300
_MAX_DETAILS = 32
_FIELDS = frozenset(
    {"sequence", "time", "actor", "role", "peer", "action", "object", "result", "detail", "previous"}
)

Value = str | int | bool


@dataclass(frozen=True, slots=True)
class Fact:
    """Something that happened, before it has its place in a log.

    `action` is noun.verb (run.submit); `actor` is role/ID of the certificate, `role` what it was let in as, `peer` the
    address that it called from, `object` what it was done to; `result` is "ok" or the code of an error.
    """

    action: str
    actor: str = ""
    role: str = ""
    peer: str = ""
    object: str = ""
    result: str = OK
    detail: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Head:
    """The last record of a log: its sequence number, from 1, and its digest. Of an empty log: 0 and GENESIS."""

    sequence: int = 0
    digest: str = GENESIS

    def __str__(self) -> str:
        """SEQUENCE:DIGEST, as commands take it."""
        return f"{self.sequence}:{self.digest}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A record as it is stored: `position` is where it stands, `body` the canonical JSON that `digest` covers."""

    position: int
    body: str
    digest: str

    @property
    def document(self) -> dict[str, Any]:
        """The record as an object, with its digest. Raises ValueError for a body that is not JSON."""
        return {**parse_json(self.body), "digest": self.digest}


@dataclass(frozen=True, slots=True)
class Known:
    """A head of the log that somebody else has seen and kept."""

    witness: str
    head: Head


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a log: the first bad record, the kind (edited, removed, reordered, cut), and a sentence."""

    sequence: int
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` saw: records up to the first bad one, the last good head, and the finding, None if all is well."""

    records: int
    head: Head
    finding: Finding | None = None


def canonical(document: Mapping[str, Any]) -> str:
    """A document as the one JSON text that is hashed: keys sorted, no spaces, ASCII, no NaN."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_of(body: str) -> str:
    """SHA-256 of a body, hex."""
    return hashlib.sha256(body.encode("utf-8", "surrogatepass")).hexdigest()


def seal(head: Head, time: str, fact: Fact) -> Entry:
    """The entry that follows `head`. Texts are cut to 300 printable characters, details to 32.

    `time` is RFC 3339, UTC.
    """
    detail = {
        _line(key): _line(value) if isinstance(value, str) else value
        for key, value in list(fact.detail.items())[:_MAX_DETAILS]
    }
    body = canonical(
        {
            "sequence": head.sequence + 1,
            "time": time,
            "actor": _line(fact.actor),
            "role": _line(fact.role),
            "peer": _line(fact.peer),
            "action": _line(fact.action),
            "object": _line(fact.object),
            "result": _line(fact.result),
            "detail": detail,
            "previous": head.digest,
        }
    )
    return Entry(head.sequence + 1, body, digest_of(body))


def parse_head(text: str) -> Head:
    """SEQUENCE:DIGEST, as `Head` prints itself. Raises ValueError."""
    sequence, _, digest = text.strip().partition(":")
    if not sequence.isdecimal() or not is_digest(digest):
        raise ValueError(f"{text!r:.100} is not SEQUENCE:DIGEST")
    return Head(int(sequence), digest)


def is_digest(text: str) -> bool:
    """Whether a text is a SHA-256 in lower-case hex."""
    return len(text) == 64 and not set(text) - set("0123456789abcdef")


def verify(entries: Iterable[Entry], known: Iterable[Known] = ()) -> Verdict:
    """Walk a whole log from its first record and name the first that is wrong.

    `entries` come in the order in which they are stored. `known` are heads that others have seen: a record that is not
    theirs, and a log that ends before theirs, is wrong too. Memory does not grow with the log.
    """
    waiting = sorted(known, key=lambda one: one.head.sequence)
    head, rest = Head(), iter(entries)
    for entry in rest:
        finding = _check(entry, head, rest)
        if finding is not None:
            return Verdict(head.sequence, head, finding)
        head = Head(head.sequence + 1, entry.digest)
        while waiting and waiting[0].head.sequence <= head.sequence:
            one = waiting.pop(0)
            if one.head.sequence == head.sequence and one.head.digest != head.digest:
                text = (
                    f"record {head.sequence} or one before it was edited, and the digests after it rewritten: "
                    f"{one.witness} has seen another record {head.sequence}"
                )
                return Verdict(head.sequence - 1, head, Finding(head.sequence, "edited", text))
    if waiting:
        last = waiting[-1]
        text = (
            f"record {head.sequence + 1} and those after it were cut off: the log ends with record {head.sequence}, "
            f"but {last.witness} has seen record {last.head.sequence}"
        )
        return Verdict(head.sequence, head, Finding(head.sequence + 1, "cut", text))
    return Verdict(head.sequence, head)


def _check(entry: Entry, head: Head, rest: Iterator[Entry]) -> Finding | None:
    """What is wrong with an entry after `head`; `rest` is read only to tell a removed record from a moved one."""
    expected = head.sequence + 1
    if digest_of(entry.body) != entry.digest:
        return Finding(
            expected, "edited", f"record {expected} was edited: its content is not what its digest says"
        )
    record = _parse(entry.body)
    if record is None:
        return Finding(expected, "edited", f"record {expected} was replaced: it is not a record of this log")
    sequence = record["sequence"]
    if sequence > expected:
        moved = any(_sequence(other) == expected for other in rest)
        if moved:
            return Finding(
                expected, "reordered", f"record {expected} was moved: record {sequence} stands in its place"
            )
        gone = (
            f"record {expected} was"
            if sequence == expected + 1
            else f"records {expected} to {sequence - 1} were"
        )
        return Finding(
            expected, "removed", f"{gone} removed: record {sequence} follows record {head.sequence}"
        )
    if sequence < expected:
        text = f"record {sequence} was moved or copied: it stands after record {head.sequence}"
        return Finding(sequence, "reordered", text)
    if record["previous"] != head.digest:
        at = max(head.sequence, 1)
        text = f"record {at} was edited, and its digest rewritten: record {expected} follows another one"
        return Finding(at, "edited", text)
    return None


def _parse(body: str) -> dict[str, Any] | None:
    try:
        record = parse_json(body)
    except ValueError:
        return None
    if not isinstance(record, dict) or record.keys() != _FIELDS or type(record["sequence"]) is not int:
        return None
    return record


def _sequence(entry: Entry) -> int | None:
    record = _parse(entry.body)
    return record["sequence"] if record is not None else None


def _line(text: str) -> str:
    return printable(text, _MAX_TEXT)
