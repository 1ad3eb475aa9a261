"""The audit log in a database file, and the heads that its owner and the other side keep of each other's logs.

Both the coordinator and every site have one. At each hello the two send their heads, and give back the head that they
have kept of the other: so each log's tail is known outside, and a side that has lost records is told by the other.
"""

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from fedcore.audit import Entry, Fact, Head, Known, seal
from fedcore.database import Database

# A migration: never edit it, add another.
AUDIT_SCHEMA = """
    CREATE TABLE audit (
        position INTEGER PRIMARY KEY,
        body TEXT NOT NULL,
        digest TEXT NOT NULL
    ) STRICT;
    CREATE TRIGGER audit_is_append_only_1 BEFORE UPDATE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;
    CREATE TRIGGER audit_is_append_only_2 BEFORE DELETE ON audit
    BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END;

    -- Heads of this log that others have kept. A claim that this log contradicts is kept for good.
    CREATE TABLE audit_witnesses (
        witness TEXT NOT NULL,
        contradicted INTEGER NOT NULL CHECK (contradicted IN (0, 1)),
        sequence INTEGER NOT NULL,
        digest TEXT NOT NULL,
        at TEXT NOT NULL,
        PRIMARY KEY (witness, contradicted)
    ) STRICT;

    -- The newest head that was seen of each other log, and whether that log has gone back since.
    CREATE TABLE audit_peers (
        peer TEXT PRIMARY KEY,
        sequence INTEGER NOT NULL,
        digest TEXT NOT NULL,
        at TEXT NOT NULL,
        went_back TEXT NOT NULL DEFAULT ''
    ) STRICT;
"""

_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Peer:
    """Somebody else's log: the newest head seen, when, and in words how it has gone back since ("" if it has not)."""

    peer: str
    head: Head
    at: str
    went_back: str


class AuditLog:
    """An append-only log. What is recorded is durable when `record` returns; writers that wait share one commit."""

    def __init__(self, database: Database, now: Callable[[], datetime] | None = None) -> None:
        self._database = database
        self._now = now or _utc_now

    async def record(self, fact: Fact) -> Head:
        """Append a fact; give the new head. Raises StorageError."""
        return await self._database.write(lambda connection: self.append(connection, fact))

    def record_now(self, fact: Fact) -> Head:
        """The same for callers without an event loop."""
        return self._database.write_now(lambda connection: self.append(connection, fact))

    def append(self, connection: sqlite3.Connection, fact: Fact) -> Head:
        """Append within the caller's transaction: the fact is recorded exactly if the transaction is committed."""
        entry = seal(_head(connection), _rfc3339(self._now()), fact)
        connection.execute(
            "INSERT INTO audit (position, body, digest) VALUES (?, ?, ?)",
            (entry.position, entry.body, entry.digest),
        )
        return Head(entry.position, entry.digest)

    def head(self) -> Head:
        """The last record."""
        return self._database.read(_head)

    def entries(self, after: int = 0, limit: int = _PAGE) -> list[Entry]:
        """At most `limit` entries that stand after a position, in the order of storage."""
        rows = self._database.read(
            lambda c: c.execute(
                "SELECT position, body, digest FROM audit WHERE position > ? ORDER BY position LIMIT ?",
                (after, limit),
            ).fetchall()
        )
        return [Entry(*row) for row in rows]

    def walk(self, after: int = 0) -> Iterator[Entry]:
        """All entries after a position, a page in memory at a time."""
        while page := self.entries(after):
            yield from page
            after = page[-1].position

    # -- the two heads of a hello -----------------------------------------------------------------

    def known(self) -> list[Known]:
        """Heads of this log that others have kept, for `verify`."""
        rows = self._database.read(
            lambda c: c.execute(
                "SELECT witness, sequence, digest FROM audit_witnesses ORDER BY witness, contradicted"
            ).fetchall()
        )
        return [Known(witness, Head(sequence, digest)) for witness, sequence, digest in rows]

    def peers(self) -> list[Peer]:
        """What is kept of the logs of others, by name."""
        rows = self._database.read(
            lambda c: c.execute(
                "SELECT peer, sequence, digest, at, went_back FROM audit_peers ORDER BY peer"
            ).fetchall()
        )
        return [
            Peer(row["peer"], Head(row["sequence"], row["digest"]), row["at"], row["went_back"])
            for row in rows
        ]

    def kept_of(self, peer: str) -> Head:
        """The newest head seen of a log; that of an empty log if none was."""
        row = self._database.read(
            lambda c: c.execute("SELECT sequence, digest FROM audit_peers WHERE peer = ?", (peer,)).fetchone()
        )
        return Head(*row) if row is not None else Head()

    def restart(self, connection: sqlite3.Connection, peer: str, head: Head) -> Head:
        """Take `head` as the newest of a log that went back for a known reason, within the caller's transaction; give the
        one kept before.
        """
        row = connection.execute(
            "SELECT sequence, digest FROM audit_peers WHERE peer = ?", (peer,)
        ).fetchone()
        connection.execute(
            "UPDATE audit_peers SET sequence = ?, digest = ?, at = ? WHERE peer = ?",
            (head.sequence, head.digest, self.time(), peer),
        )
        return Head(*row) if row is not None else Head()

    def time(self) -> str:
        """The present moment as records have it."""
        return _rfc3339(self._now())

    def exchange(self, connection: sqlite3.Connection, peer: str, *, theirs: Head, ours: Head) -> list[str]:
        """Take in what the other side said in a hello, within the caller's transaction.

        `theirs` is the head of its log, `ours` the head of this log that it has kept. Gives, in words, what contradicts:
        a log of its that has gone back, a record of ours that it has seen and we have not.
        """
        at = _rfc3339(self._now())
        found = [_witnessed(connection, peer, ours, at), _seen(connection, peer, theirs, at)]
        return [text for text in found if text]


def _witnessed(connection: sqlite3.Connection, witness: str, claim: Head, at: str) -> str:
    """Keep the witness's claim about our log; say so if the log contradicts it."""
    if claim.sequence == 0:
        return ""
    row = connection.execute("SELECT digest FROM audit WHERE position = ?", (claim.sequence,)).fetchone()
    contradicted = row is None or row[0] != claim.digest
    values = (witness, int(contradicted), claim.sequence, claim.digest, at)
    # The newest claim that holds; the first that does not.
    verb = "INSERT OR IGNORE" if contradicted else "INSERT OR REPLACE"
    connection.execute(
        f"{verb} INTO audit_witnesses (witness, contradicted, sequence, digest, at) VALUES (?, ?, ?, ?, ?)",
        values,
    )
    if not contradicted:
        return ""
    what = "another" if row is not None else "no"
    return (
        f"{witness} has seen record {claim.sequence} of this log ({claim.digest}); here is {what} such record"
    )


def _seen(connection: sqlite3.Connection, peer: str, head: Head, at: str) -> str:
    """Keep the newest head of the other's log; say so if that log has gone back."""
    row = connection.execute("SELECT sequence, digest FROM audit_peers WHERE peer = ?", (peer,)).fetchone()
    kept = Head(*row) if row is not None else Head()
    if head.sequence > kept.sequence or (row is None and head == kept):
        connection.execute(
            "INSERT INTO audit_peers (peer, sequence, digest, at) VALUES (?, ?, ?, ?) ON CONFLICT (peer) DO"
            " UPDATE SET sequence = excluded.sequence, digest = excluded.digest, at = excluded.at",
            (peer, head.sequence, head.digest, at),
        )
        return ""
    if head == kept:
        return ""
    text = f"the log of {peer} had record {kept.sequence} ({kept.digest}); it now ends with {head}"
    connection.execute("UPDATE audit_peers SET went_back = ? WHERE peer = ? AND went_back = ''", (text, peer))
    return text


def _head(connection: sqlite3.Connection) -> Head:
    row = connection.execute("SELECT position, digest FROM audit ORDER BY position DESC LIMIT 1").fetchone()
    return Head(*row) if row is not None else Head()


def _utc_now() -> datetime:
    return datetime.now(UTC)


def _rfc3339(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
