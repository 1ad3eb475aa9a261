"""Which sites belong to the federation, and which certificates were issued."""

import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509

from fedcore.database import Database
from fedcore.errors import ConflictError, NotFoundError, PermissionDeniedError
from fedcore.identity import Subject
from fedcore.pki import issuer_key_id, serial_text
from fedserver.round_decisions import Withheld
from fedserver.standing import Decision, Standing


@dataclass(frozen=True, slots=True)
class SiteRow:
    """An enrolled site. Times are RFC 3339, UTC; `last_seen` is empty if it never connected."""

    id: str
    enrolled_at: str
    last_seen: str
    certificate_not_after: str
    decision: Decision

    @property
    def enabled(self) -> bool:
        """Whether runs may ask it."""
        return self.decision.standing is Standing.ENABLED


_SITES = """
    SELECT s.id, s.enrolled_at, s.standing, s.standing_since, s.standing_by, s.standing_reason,
           coalesce(s.last_seen, '') AS last_seen,
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

    def sites(self, *, removed: bool = False) -> list[SiteRow]:
        """All enrolled sites, by id; with `removed`, also those that were removed."""
        query = f"{_SITES} WHERE ? OR s.standing != 'removed' ORDER BY s.id"
        return [_site(row) for row in self._database.read(lambda c: c.execute(query, (removed,)).fetchall())]

    def site(self, site_id: str) -> SiteRow:
        """One site that is enrolled or was. Raises NotFoundError."""
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
        """Raise PermissionDeniedError, which says why, unless the site is enrolled here and served."""
        try:
            row = self.site(site_id)
        except NotFoundError as error:
            raise PermissionDeniedError(
                f"site {site_id} is not in this coordinator's registry",
                hint="enrol it again with a new token",
            ) from error
        if not row.decision.standing.served:
            raise not_served(row)

    async def touch(self, site_id: str, now: datetime) -> None:
        """Note that a site was heard of."""
        await self._database.write(
            lambda c: c.execute("UPDATE sites SET last_seen = ? WHERE id = ?", (rfc3339(now), site_id))
        )

    def withheld(self) -> dict[str, Withheld]:
        """The sites that get no further work, and why. Asked with every look at the rounds: one small read."""
        query = (
            "SELECT id, standing, standing_since, standing_by, standing_reason FROM sites"
            " WHERE standing != 'enabled'"
        )
        rows = self._database.read(lambda c: c.execute(query).fetchall())
        return {row["id"]: why for row in rows if (why := _decision(row).withheld) is not None}

    async def decide(
        self, site_id: str, standing: Standing, *, by: str, reason: str, now: datetime
    ) -> SiteRow:
        """Give a site another standing; the row as it is then. A removed site's open tokens are void.

        Asked for the standing it has, with no other reason, nothing changes. Raises NotFoundError, ConflictError if the
        site was removed, or is to be drained while it is disabled.
        """

        def change(connection: sqlite3.Connection) -> None:
            row = connection.execute("SELECT * FROM sites WHERE id = ?", (site_id,)).fetchone()
            before = _decision(row)
            if before.standing is standing and reason in ("", before.reason):
                return
            _check_change(site_id, before.standing, standing)
            connection.execute(
                "UPDATE sites SET standing = ?, standing_since = ?, standing_by = ?, standing_reason = ?"
                " WHERE id = ?",
                (standing.value, rfc3339(now), by, reason, site_id),
            )
            if standing is Standing.REMOVED:
                connection.execute(
                    "UPDATE tokens SET expires_at = ? WHERE site = ? AND used_at IS NULL AND expires_at > ?",
                    (rfc3339(now), site_id, rfc3339(now)),
                )

        self.site(site_id)
        await self._database.write(change)
        return self.site(site_id)


def not_served(row: SiteRow) -> PermissionDeniedError:
    """The refusal that a site's agent reads while an operator keeps it out."""
    return PermissionDeniedError(
        f"site {row.id} is {row.decision}", hint="ask the federation's operator to let it in again"
    )


def _check_change(site: str, before: Standing, after: Standing) -> None:
    if before is Standing.REMOVED and after is not Standing.REMOVED:
        raise ConflictError(
            f"site {site} was removed",
            hint=f"it comes back with a new token: fedctl enroll token create --site {site}",
        )
    if before is Standing.DISABLED and after is Standing.DRAINING:
        raise ConflictError(
            f"site {site} is disabled: it has no work to finish", hint=f"fedctl site enable {site}"
        )


def enrol(connection: sqlite3.Connection, site_id: str, now: datetime) -> None:
    """Add a site, within the caller's transaction.

    One that enrols again keeps its row: when it first came, and its standing, unless it had been removed.
    """
    connection.execute(
        "INSERT INTO sites (id, enrolled_at) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET standing = 'enabled',"
        " standing_since = '', standing_by = '', standing_reason = '' WHERE standing = 'removed'",
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
    return SiteRow(row["id"], row["enrolled_at"], row["last_seen"], row["not_after"], _decision(row))


def _decision(row: sqlite3.Row) -> Decision:
    return Decision(
        Standing(row["standing"]), row["standing_since"], row["standing_by"], row["standing_reason"]
    )
