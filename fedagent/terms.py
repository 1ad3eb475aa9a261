"""The coordinator's terms as this site has followed them: never back to an older one."""

import sqlite3
from dataclasses import dataclass

from fedcore.audit import Head
from fedcore.database import Database
from fedcore.errors import TermError
from fedcore.term import NO_TERM, Term

_COLUMNS = "number, began_ms, followed_at, head_before, head_after"


@dataclass(frozen=True, slots=True)
class Followed:
    """A term that this site follows, or followed: since when (RFC 3339), and what the restore did to the coordinator's
    audit log: the head kept here before, the head that it came back with (SEQUENCE:DIGEST).
    """

    term: Term
    at: str
    head_before: str
    head_after: str

    def __str__(self) -> str:
        """For people, once there was a restore."""
        before, after = (head.partition(":")[0] for head in (self.head_before, self.head_after))
        return (
            f"the coordinator was restored from a backup, {self.term}: "
            f"its log had {before} records before and {after} then"
        )


def newest_term(connection: sqlite3.Connection) -> Term:
    """The newest term that this site knows; NO_TERM if it knows none."""
    row = connection.execute(
        "SELECT number, began_ms FROM coordinator_terms ORDER BY number DESC, began_ms DESC LIMIT 1"
    ).fetchone()
    return NO_TERM if row is None else Term(row["number"], row["began_ms"])


def follow(connection: sqlite3.Connection, term: Term, at: str, before: Head, after: Head) -> None:
    """Keep a newer term, within the caller's transaction."""
    connection.execute(
        f"INSERT INTO coordinator_terms ({_COLUMNS}) VALUES (?, ?, ?, ?, ?)",  # noqa: S608
        (term.number, term.began_ms, at, str(before), str(after)),
    )


def check_not_older(term: Term, known: Term) -> None:
    """Raise TermError for a coordinator of an earlier term than `known`."""
    if term < known:
        raise TermError(
            f"the coordinator there is of {term}, but this site follows one of {known}: it is the one that was replaced",
            hint="check that the coordinator's name leads to the restored machine, and stop the old one",
        )


def restores(database: Database) -> list[Followed]:
    """The restores that this site has followed, the oldest first."""
    rows = database.read(
        lambda c: c.execute(
            f"SELECT {_COLUMNS} FROM coordinator_terms WHERE number > 1 ORDER BY number, began_ms"  # noqa: S608
        ).fetchall()
    )
    return [
        Followed(
            Term(row["number"], row["began_ms"]), row["followed_at"], row["head_before"], row["head_after"]
        )
        for row in rows
    ]
