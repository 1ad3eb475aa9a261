"""Which sites belong to the federation, and which certificates were issued."""

import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509

from fedcore.database import Database
from fedcore.errors import NotFoundError, PermissionDeniedError
from fedcore.identity import Subject
from fedcore.pki import issuer_key_id, serial_text


@dataclass(frozen=True, slots=True)
class SiteRow:
    """An enrolled site. Times are RFC 3339, UTC; `last_seen` is empty if it never connected."""

    id: str
    enrolled_at: str
    enabled: bool
    last_seen: str
    certificate_not_after: str


_SITES = """
    SELECT s.id, s.enrolled_at, s.enabled, coalesce(s.last_seen, '') AS last_seen,
           coalesce((SELECT max(c.not_after) FROM certificates c
                     WHERE c.role = 'site' AND c.subject_id = s.id AND c.revoked_at IS NULL), '') AS not_after
    FROM sites s
"""


def utc_now() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


def rfc3339(moment: datetime) -> str:
    """A moment as the database writes it: UTC, whole microseconds, sortable as text."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


class Registry:
    """The sites of the federation. Reads are quick and synchronous; writes are durable when awaited."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def sites(self) -> list[SiteRow]:
        """All enrolled sites, by id."""
        query = f"{_SITES} ORDER BY s.id"
        return [_site(row) for row in self._database.read(lambda c: c.execute(query).fetchall())]

    def site(self, site_id: str) -> SiteRow:
        """One enrolled site. Raises NotFoundError."""
        query = f"{_SITES} WHERE s.id = ?"
        row = self._database.read(lambda c: c.execute(query, (site_id,)).fetchone())
        if row is None:
            raise NotFoundError(
                f"no site {site_id!r:.80} is enrolled", hint="'fedctl site list' shows those that are"
            )
        return _site(row)

    def enabled_sites(self) -> list[str]:
        """Ids of the sites that runs may ask, sorted: what a plan without `sites` expects."""
        return [row.id for row in self.sites() if row.enabled]

    def check_admitted(self, site_id: str) -> None:
        """Raise PermissionDeniedError unless the site is enrolled here and enabled."""
        try:
            row = self.site(site_id)
        except NotFoundError as error:
            raise PermissionDeniedError(
                f"site {site_id} is not in this coordinator's registry",
                hint="enrol it again with a new token",
            ) from error
        if not row.enabled:
            raise PermissionDeniedError(
                f"site {site_id} is disabled", hint="ask the federation's operator to let it in again"
            )

    async def touch(self, site_id: str, now: datetime) -> None:
        """Note that a site was heard of."""
        await self._database.write(
            lambda c: c.execute("UPDATE sites SET last_seen = ? WHERE id = ?", (rfc3339(now), site_id))
        )

    async def set_enabled(self, site_id: str, enabled: bool) -> None:
        """Let runs ask a site, or not. Raises NotFoundError."""
        self.site(site_id)
        await self._database.write(
            lambda c: c.execute("UPDATE sites SET enabled = ? WHERE id = ?", (int(enabled), site_id))
        )


def enrol(connection: sqlite3.Connection, site_id: str, now: datetime) -> None:
    """Add a site, within the caller's transaction.

    One that enrols again keeps its row: when it first came, and whether it is enabled.
    """
    connection.execute(
        "INSERT INTO sites (id, enrolled_at) VALUES (?, ?) ON CONFLICT (id) DO NOTHING",
        (site_id, rfc3339(now)),
    )


def record_certificate(
    connection: sqlite3.Connection,
    certificate: x509.Certificate,
    subject: Subject,
    now: datetime,
    *,
    renews: str = "",
) -> str:
    """Note an issued certificate, within the caller's transaction; give its serial number.

    One that is not noted is refused by every RPC. `renews` is the serial number of the one it takes the place of.
    """
    serial = serial_text(certificate)
    connection.execute(
        "INSERT INTO certificates"
        " (serial, role, subject_id, not_before, not_after, issued_at, issuer, renews)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            serial,
            subject.role,
            subject.id,
            rfc3339(certificate.not_valid_before_utc),
            rfc3339(certificate.not_valid_after_utc),
            rfc3339(now),
            issuer_key_id(certificate),
            renews,
        ),
    )
    return serial


def _site(row: sqlite3.Row) -> SiteRow:
    return SiteRow(row["id"], row["enrolled_at"], bool(row["enabled"]), row["last_seen"], row["not_after"])
