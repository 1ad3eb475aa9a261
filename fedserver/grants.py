"""Roles of operators: the certificate says who an operator is, grants in the database say what for."""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from fedcore.database import Database
from fedcore.errors import ConflictError, UsageError
from fedcore.identity import Caller, is_name
from fedserver.authorisation import ANY_OPERATOR, GRANTABLE, OWNER, SITE
from fedserver.registry import rfc3339, utc_now


@dataclass(frozen=True, slots=True)
class Grant:
    """A role that an operator has. `granted_at` is RFC 3339, UTC."""

    operator: str
    role: str
    granted_at: str
    granted_by: str


class Grants:
    """Who has which role. A change holds from the next RPC on, and is durable when awaited."""

    def __init__(self, database: Database, clock: Callable[[], datetime] = utc_now) -> None:
        self._database = database
        self._clock = clock

    def roles_of(self, caller: Caller) -> frozenset[str]:
        """What a caller is let in as: a site as a site, an operator as what it was granted."""
        if caller.role == SITE:
            return frozenset({SITE})
        rows = self._database.read(
            lambda c: c.execute("SELECT role FROM grants WHERE operator = ?", (caller.id,)).fetchall()
        )
        return frozenset({ANY_OPERATOR, *(row[0] for row in rows)})

    def rows(self, operator: str = "") -> list[Grant]:
        """All grants, or one operator's, by operator and role."""
        rows = self._database.read(
            lambda c: c.execute(
                "SELECT operator, role, granted_at, granted_by FROM grants WHERE ? IN ('', operator)"
                " ORDER BY operator, role",
                (operator,),
            ).fetchall()
        )
        return [Grant(*row) for row in rows]

    async def grant(self, operator: str, role: str, by: str) -> None:
        """Give an operator a role; one that it has stays as it is. Raises UsageError."""
        check_grant(operator, role)
        now = self._clock()
        await self._database.write(lambda c: grant(c, operator, role, now, by))

    async def revoke(self, operator: str, role: str) -> None:
        """Take a role away; nothing happens if the operator has not got it.

        Raises UsageError, and ConflictError for the last owner, without whom nobody could grant anything.
        """
        check_grant(operator, role)

        def write(connection: sqlite3.Connection) -> None:
            owners = [
                row[0] for row in connection.execute("SELECT operator FROM grants WHERE role = 'owner'")
            ]
            if role == OWNER and owners == [operator]:
                raise ConflictError(
                    f"{operator} is the only owner, and stays one",
                    hint="make another one first: fedctl role grant OPERATOR owner",
                )
            connection.execute("DELETE FROM grants WHERE operator = ? AND role = ?", (operator, role))

        await self._database.write(write)


def grant(connection: sqlite3.Connection, operator: str, role: str, now: datetime, by: str) -> None:
    """Give a role, within the caller's transaction."""
    connection.execute(
        "INSERT INTO grants (operator, role, granted_at, granted_by) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (operator, role) DO NOTHING",
        (operator, role, rfc3339(now), by),
    )


def check_grant(operator: str, *roles: str) -> None:
    """Raise UsageError unless `operator` may be an operator's name and `roles` are roles."""
    if not is_name(operator):
        raise UsageError(
            f"{operator!r:.80} is not an operator's name",
            hint="lower-case letters, digits, '.', '_' and '-', 63 at most, first and last a letter or digit",
        )
    for role in roles:
        if role not in GRANTABLE:
            raise UsageError(f"{role!r:.80} is not a role: expected {', '.join(GRANTABLE)}")
