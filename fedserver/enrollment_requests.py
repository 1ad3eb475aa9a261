"""Requests of sites to be let in without a token, each waiting for an operator's decision.

Anybody who reaches the enrolment port can file one, so their number is bounded: in all, by address and by site, and they
expire. Where the table is full, a newcomer takes the place of the newest request of the address that has the most; so
filling it takes as many addresses as it has places. A site whose request was dropped or has expired files it again.
"""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from fedcore.database import Database
from fedcore.errors import ConfigError, ConflictError, NotFoundError, OverloadedError
from fedcore.identity import Subject, is_name
from fedcore.pki import certificates_to_pem, key_fingerprint, public_key_of_request
from fedserver.authority import Authority
from fedserver.config import LimitsConfig
from fedserver.registry import enrol, record_certificate, rfc3339, utc_now

WAITING, APPROVED, DENIED = "waiting", "approved", "denied"
# How long a decision is kept for the site to fetch; an approval at most as long as its certificate lives.
_KEPT = timedelta(days=7)
_SELECT = """
    SELECT r.key_fingerprint, r.site, r.csr_pem, r.address, r.requested_at, r.expires_at, r.state, r.decided_at,
           r.decided_by, r.reason, r.serial, r.chain_pem, coalesce(s.enrolled_at, '') AS enrolled_at
    FROM enrollment_requests r LEFT JOIN sites s ON s.id = r.site
"""


@dataclass(frozen=True, slots=True)
class RequestRow:
    """A request. Times are RFC 3339, UTC; what does not apply is empty. `enrolled_at` is of the site of that name."""

    key_fingerprint: str
    site: str
    csr_pem: str
    address: str
    requested_at: str
    expires_at: str
    state: str
    decided_at: str
    decided_by: str
    reason: str
    serial: str
    chain_pem: str
    enrolled_at: str


class EnrollmentRequests:
    """The table of requests. Reads are quick and synchronous; changes are durable when awaited."""

    def __init__(
        self,
        database: Database,
        authority: Callable[[], Authority],
        limits: LimitsConfig,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database = database
        self._authority = authority
        self._limits = limits
        self._clock = clock

    def one(self, fingerprint: str) -> RequestRow:
        """The request of a key. Raises NotFoundError if there is none, or it has expired."""
        row = self._database.read(lambda c: _find(c, fingerprint, self._clock()))
        if row is None:
            raise _missing(fingerprint)
        return row

    def rows(self, *, prefix: str = "", state: str = "") -> list[RequestRow]:
        """Requests that have not expired, the newest first."""
        query = (
            f"{_SELECT} WHERE r.expires_at > ? AND substr(r.key_fingerprint, 1, ?) = ? AND ? IN ('', r.state)"
            " ORDER BY r.requested_at DESC, r.rowid DESC"
        )
        values = (rfc3339(self._clock()), len(prefix), prefix, state)
        return [_row(one) for one in self._database.read(lambda c: c.execute(query, values).fetchall())]

    async def file(self, site: str, csr_pem: str, address: str) -> tuple[RequestRow, bool]:
        """Take a request in, and whether it is a new one: its key may have a request already, which then stands.

        Raises ConfigError for a name that is not allowed, IdentityError for a request that can't be signed, ConflictError
        if the key asked for another name, OverloadedError where too many wait.
        """
        if not is_name(site):
            raise ConfigError(f"{site!r:.80} is not a site name")
        fingerprint = key_fingerprint(public_key_of_request(csr_pem))
        now = self._clock()
        known = self._database.read(lambda c: _find(c, fingerprint, now))
        if known is not None:
            row, new = known, False
        else:
            # What is refused costs no write: refusals don't queue before those who are let in.
            self._database.read(lambda c: self._make_room(c, site, address, now))
            row, new = await self._database.write(
                lambda c: self._insert(c, fingerprint, site, csr_pem, address, now)
            )
        if row.site != site:
            raise ConflictError(f"this key has asked to be let in as {row.site}, not as {site}")
        return row, new

    def _insert(
        self,
        connection: sqlite3.Connection,
        fingerprint: str,
        site: str,
        csr_pem: str,
        address: str,
        now: datetime,
    ) -> tuple[RequestRow, bool]:
        connection.execute("DELETE FROM enrollment_requests WHERE expires_at <= ?", (rfc3339(now),))
        if (known := _find(connection, fingerprint, now)) is not None:
            return known, False
        dropped = self._make_room(connection, site, address, now)
        connection.execute("DELETE FROM enrollment_requests WHERE key_fingerprint = ?", (dropped,))
        expires_at = now + timedelta(hours=self._limits.enroll_request_hours)
        connection.execute(
            "INSERT INTO enrollment_requests (key_fingerprint, site, csr_pem, address, requested_at, expires_at)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (fingerprint, site, csr_pem, address, rfc3339(now), rfc3339(expires_at)),
        )
        made = _find(connection, fingerprint, now)
        assert made is not None, "inserted above"
        return made, True

    def _make_room(self, connection: sqlite3.Connection, site: str, address: str, now: datetime) -> str:
        """Fingerprint of the request that a new one takes the place of; empty if there is room.

        Raises OverloadedError if there is none for this address or this site.
        """
        limits = self._limits
        waiting = connection.execute(
            "SELECT key_fingerprint, site, address FROM enrollment_requests"
            " WHERE state = 'waiting' AND expires_at > ? ORDER BY requested_at, rowid",
            (rfc3339(now),),
        ).fetchall()
        by_address: dict[str, list[str]] = {}
        for row in waiting:
            by_address.setdefault(row["address"], []).append(row["key_fingerprint"])
        mine = len(by_address.get(address, ()))
        if mine >= limits.enroll_requests_per_address:
            raise OverloadedError(
                f"{mine} requests to be let in wait already from address {address}, the limit for one address",
                hint="the operator approves or denies them: fedctl enroll request list",
            )
        named = sum(row["site"] == site for row in waiting)
        if named >= limits.enroll_requests_per_site:
            raise OverloadedError(
                f"{named} requests to be let in as {site} wait already, the limit for one name",
                hint="the operator compares fingerprints and denies the others: fedctl enroll request list",
            )
        if len(waiting) < limits.enroll_requests:
            return ""
        most = max(by_address.values(), key=len)
        if len(most) <= mine + 1:
            raise OverloadedError(
                f"{len(waiting)} requests to be let in wait already, the limit of this coordinator",
                hint="try again later, or ask the operator for a token: fedctl enroll token create --site SITE",
            )
        return most[-1]

    async def approve(self, fingerprint: str, by: str) -> RequestRow:
        """Issue the certificate that was asked for, and enrol the site. One that is approved stays as it is.

        Raises NotFoundError, ConflictError if it was denied, IdentityError if the issuing CA has ended.
        """
        return await self._database.write(lambda c: self._approve(c, fingerprint, by))

    def _approve(self, connection: sqlite3.Connection, fingerprint: str, by: str) -> RequestRow:
        now, authority = self._clock(), self._authority()
        row = _undecided(connection, fingerprint, now, APPROVED)
        if row.state == APPROVED:
            return row
        subject = Subject(authority.federation, "site", row.site)
        chain = authority.issue(subject, public_key_of_request(row.csr_pem), now)
        serial = record_certificate(connection, chain[0], subject, now)
        enrol(connection, row.site, now)
        kept_until = min(now + _KEPT, chain[0].not_valid_after_utc)
        return _decide(
            connection, row, now, state=APPROVED, decided_by=by, serial=serial, reason="",
            chain_pem=certificates_to_pem(chain).decode(), expires_at=rfc3339(kept_until),
        )  # fmt: skip

    async def deny(self, fingerprint: str, by: str, reason: str) -> RequestRow:
        """Refuse a request; the site is told why. One that is denied stays as it is.

        Raises NotFoundError, ConflictError if it was approved.
        """
        now = self._clock()

        def write(connection: sqlite3.Connection) -> RequestRow:
            row = _undecided(connection, fingerprint, now, DENIED)
            if row.state == DENIED:
                return row
            return _decide(
                connection, row, now, state=DENIED, decided_by=by, serial="", reason=reason, chain_pem="",
                expires_at=rfc3339(now + _KEPT),
            )  # fmt: skip

        return await self._database.write(write)


def _undecided(connection: sqlite3.Connection, fingerprint: str, now: datetime, decision: str) -> RequestRow:
    """A request that waits, or was decided just so. Raises NotFoundError, ConflictError."""
    row = _find(connection, fingerprint, now)
    if row is None:
        raise _missing(fingerprint)
    if row.state not in (WAITING, decision):
        undo = f"take it back with: fedctl cert revoke {row.serial[:12]}" if row.serial else ""
        raise ConflictError(
            f"the request of {row.site} was {row.state} at {row.decided_at} by {row.decided_by}",
            hint=undo or "the site may ask again",
        )
    return row


def _decide(connection: sqlite3.Connection, row: RequestRow, now: datetime, **values: str) -> RequestRow:
    connection.execute(
        "UPDATE enrollment_requests SET state = :state, decided_by = :decided_by, serial = :serial, reason = :reason,"
        " chain_pem = :chain_pem, expires_at = :expires_at, decided_at = :decided_at"
        " WHERE key_fingerprint = :key_fingerprint",
        {**values, "decided_at": rfc3339(now), "key_fingerprint": row.key_fingerprint},
    )
    decided = connection.execute(f"{_SELECT} WHERE r.key_fingerprint = ?", (row.key_fingerprint,)).fetchone()
    return _row(decided)


def _missing(fingerprint: str) -> NotFoundError:
    return NotFoundError(
        f"no request of the key {fingerprint[:64]!r} is here",
        hint="it may have expired: 'fedctl enroll request list' shows all; the site asks again by itself",
    )


def _find(connection: sqlite3.Connection, fingerprint: str, now: datetime) -> RequestRow | None:
    row = connection.execute(
        f"{_SELECT} WHERE r.key_fingerprint = ? AND r.expires_at > ?", (fingerprint, rfc3339(now))
    ).fetchone()
    return None if row is None else _row(row)


def _row(row: sqlite3.Row) -> RequestRow:
    return RequestRow(**{key: row[key] for key in row.keys()})  # noqa: SIM118 - a Row iterates over values
