"""The coordinator's term, and whether it is held: restored, and not yet told what was revoked since the backup."""

import sqlite3
from datetime import datetime

from fedcore.database import Database
from fedcore.errors import HeldError
from fedcore.term import Term
from fedserver.registry import rfc3339

_NEWEST = "SELECT number, began_ms, released_at FROM terms ORDER BY number DESC, began_ms DESC LIMIT 1"


class Terms:
    """The terms of one coordinator's database. Reads are quick and synchronous."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._released = not self.held()

    def current(self) -> Term:
        """The term that this coordinator is in."""
        row = self._database.read(lambda c: c.execute(_NEWEST).fetchone())
        return Term(row["number"], row["began_ms"])

    def check_released(self) -> None:
        """Raise HeldError until this program lets people in (`let_in`), which it does once the coordinator is released."""
        if not self._released:
            raise HeldError(
                "this coordinator was restored from a backup and serves nobody until it knows which certificates were "
                "revoked since",
                hint="on its machine: fedserver release --home DIR --revoked SERIAL,... or --no-revocations-since",
            )

    def let_in(self) -> None:
        """Serve from now on."""
        self._released = True

    def held(self) -> bool:
        """Whether the coordinator waits for `fedserver release`, which may run beside this process."""
        row = self._database.read(lambda c: c.execute(_NEWEST).fetchone())
        return row["released_at"] is None

    def lost_after(self, known: Term) -> int | None:
        """The last audit record that a member which knows `known` as the newest term can still expect here; None if no
        restore came after that term.
        """
        row = self._database.read(
            lambda c: c.execute(
                "SELECT min(audit_sequence) FROM terms WHERE (number, began_ms) > (?, ?) AND number > 1",
                (known.number, known.began_ms),
            ).fetchone()
        )
        return None if row[0] is None else int(row[0])


def begin_term(
    connection: sqlite3.Connection, now: datetime, *, backup: str, audit_sequence: int, at_least: int = 0
) -> tuple[Term, Term]:
    """Begin a held term, within the caller's transaction; gives the one before and the new one.

    `audit_sequence` is the last record of the audit log that the backup held. The number is the next, or `at_least`.
    """
    row = connection.execute(_NEWEST).fetchone()
    before = Term(row["number"], row["began_ms"])
    term = Term(max(before.number + 1, at_least), int(now.timestamp() * 1000))
    connection.execute(
        "INSERT INTO terms (number, began_ms, backup, audit_sequence) VALUES (?, ?, ?, ?)",
        (term.number, term.began_ms, backup, audit_sequence),
    )
    return before, term


def release(connection: sqlite3.Connection, now: datetime) -> None:
    """Let the coordinator serve, within the caller's transaction."""
    connection.execute("UPDATE terms SET released_at = ? WHERE released_at IS NULL", (rfc3339(now),))
