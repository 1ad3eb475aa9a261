"""Every certificate that this coordinator issued: which of them count, their renewal, their revocation.

A certificate counts while it is in this registry, is not revoked, and was signed by a CA that is still trusted; its
time is checked with the caller's identity (`fedcore.identity`). Every RPC asks, and so does every open stream, twice
a second (`fedserver.open_calls`).
"""

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedcore.database import Database
from fedcore.errors import ConflictError, IdentityError, NotFoundError
from fedcore.identity import Caller, Subject, subject_of
from fedcore.pki import certificates_from_pem, public_key_of_request, serial_text
from fedcore.renewal import GRACE, check_statement, ended_statement
from fedserver.authority import Authority
from fedserver.registry import record_certificate, rfc3339, utc_now

_ENROL_AGAIN = "enrol again with a new token: fedctl enroll token create, then fedagent enroll --force"
_REVOKED_HINT = "ask the federation's operator; a site enrols again with a new token: fedagent enroll --force"
_SELECT = """
    SELECT c.serial, c.role, c.subject_id, c.not_before, c.not_after, c.issued_at, c.issuer, c.renews,
           coalesce(c.revoked_at, '') AS revoked_at, c.revoked_by, c.reason,
           coalesce((SELECT n.serial FROM certificates n WHERE n.renews = c.serial
                     ORDER BY n.issued_at DESC, n.rowid DESC LIMIT 1), '') AS replaced_by
    FROM certificates c
"""
# A certificate and all that were renewed from it, one from the other: who renewed a stolen one loses both.
_FAMILY = """
    WITH RECURSIVE family (serial) AS (
        SELECT ? UNION SELECT c.serial FROM certificates c JOIN family f ON c.renews = f.serial
    )
    SELECT serial FROM family
"""


@dataclass(frozen=True, slots=True)
class CertificateRow:
    """An issued certificate. Times are RFC 3339, UTC; what does not apply is empty."""

    serial: str
    role: str
    subject_id: str
    not_before: str
    not_after: str
    issued_at: str
    issuer: str
    renews: str
    revoked_at: str
    revoked_by: str
    reason: str
    replaced_by: str

    def state(self, now: datetime) -> str:
        """ "valid", "replaced", "revoked", "ended" or "not yet valid"."""
        moment = rfc3339(now)
        if self.revoked_at:
            return "revoked"
        if moment > self.not_after:
            return "ended"
        if moment < self.not_before:
            return "not yet valid"
        return "replaced" if self.replaced_by else "valid"


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose certificates: all of a role if `id` is None."""

    role: str
    id: str | None = None


class Certificates:
    """The registry of certificates. Checks are quick and synchronous; changes are durable when awaited.

    `authority` is asked for at each use, for it changes while the program runs (`cert ca rotate`).
    """

    def __init__(
        self,
        database: Database,
        authority: Callable[[], Authority],
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database = database
        self._authority = authority
        self._clock = clock
        # Found good: callers come back, and streams ask twice a second. Emptied by every revocation,
        # which only this process makes (one process a home).
        self._good: set[tuple[str, str, str]] = set()

    @property
    def authority(self) -> Authority:
        """Who signs at present."""
        return self._authority()

    def check(self, caller: Caller) -> None:
        """Raise IdentityError, which names why, unless the caller's certificate counts."""
        key = (caller.serial, caller.role, caller.id)
        if key not in self._good:
            self._look_up(caller)
            self._good.add(key)
        if caller.issuer not in self._authority().issuers:
            raise IdentityError(
                f"{caller}: certificate {caller.serial} was signed by CA {caller.issuer[:16] or '(unnamed)'}, "
                "which this federation no longer trusts",
                hint=_ENROL_AGAIN,
            )

    def forget_checked(self) -> None:
        """Look every certificate up again: another process may have revoked some while nobody was served."""
        self._good.clear()

    def _look_up(self, caller: Caller) -> None:
        row = self._find(caller.serial)
        if row is None or (row.role, row.subject_id) != (caller.role, caller.id):
            raise IdentityError(
                f"{caller}: certificate {caller.serial} is not in this coordinator's registry",
                hint=f"{_ENROL_AGAIN}; so it is with certificates issued after the backup that it was restored from",
            )
        if row.revoked_at:
            raise _revoked(row)

    def rows(self, *, prefix: str = "", owner: Owner | None = None) -> list[CertificateRow]:
        """The certificates whose serial number begins with `prefix`, of one owner if given, the newest first."""
        conditions, values = ["substr(c.serial, 1, ?) = ?"], [len(prefix), prefix]
        if owner is not None:
            conditions.append("c.role = ?")
            values.append(owner.role)
            if owner.id is not None:
                conditions.append("c.subject_id = ?")
                values.append(owner.id)
        query = f"{_SELECT} WHERE {' AND '.join(conditions)} ORDER BY c.issued_at DESC, c.rowid DESC"
        return [_row(one) for one in self._database.read(lambda c: c.execute(query, values).fetchall())]

    def one(self, prefix: str) -> CertificateRow:
        """The certificate whose serial number is, or alone begins with, `prefix`.

        Raises NotFoundError, ConflictError if several begin so.
        """
        found = self.rows(prefix=prefix.lower()) if prefix else []
        exact = [row for row in found if row.serial == prefix.lower()]
        if len(exact or found) == 1:
            return (exact or found)[0]
        if found:
            raise ConflictError(
                f"{len(found)} certificates' serial numbers begin with {prefix!r:.50}, expected one",
                hint="give more of it: fedctl cert list",
            )
        raise NotFoundError(f"no certificate {prefix!r:.50}", hint="'fedctl cert list' shows all")

    async def revoke(self, prefix: str, *, by: Caller, reason: str) -> tuple[list[CertificateRow], int]:
        """End one certificate and all that were renewed from it. Gives them, and how many were not ended before.

        Raises NotFoundError, ConflictError for the coordinator's own and for the one of this very call.
        """
        return await self._revoke(_FAMILY, (self.one(prefix).serial,), by, reason)

    async def revoke_all(self, owner: Owner, *, by: Caller, reason: str) -> tuple[list[CertificateRow], int]:
        """End all of an owner's certificates that can be used or, ended lately, still be renewed; as `revoke`.

        Raises NotFoundError if the owner never had one.
        """
        if not self.rows(owner=owner):
            raise NotFoundError(
                f"{owner.role} {owner.id!r:.80} has no certificate", hint="'fedctl cert list' shows all"
            )
        query = "SELECT serial FROM certificates WHERE role = ? AND subject_id = ? AND not_after >= ?"
        values = (owner.role, owner.id or "", rfc3339(self._clock() - GRACE))
        return await self._revoke(query, values, by, reason)

    async def _revoke(
        self, query: str, values: tuple[str, ...], by: Caller, reason: str
    ) -> tuple[list[CertificateRow], int]:
        now = rfc3339(self._clock())

        def change(connection: sqlite3.Connection) -> tuple[list[CertificateRow], int]:
            serials = [row["serial"] for row in connection.execute(query, values).fetchall()]
            if by.serial in serials:
                raise ConflictError(
                    f"certificate {by.serial} is the one of this call: revoking it would lock you out",
                    hint="let another operator do it, or renew first: fedctl cert renew",
                )
            changed = 0
            for serial in serials:
                changed += connection.execute(
                    "UPDATE certificates SET revoked_at = ?, revoked_by = ?, reason = ?"
                    " WHERE serial = ? AND revoked_at IS NULL",
                    (now, by.id, reason, serial),
                ).rowcount
            rows = [connection.execute(f"{_SELECT} WHERE c.serial = ?", (s,)).fetchone() for s in serials]
            if any(row["role"] == "coordinator" for row in rows):
                raise ConflictError(
                    "the coordinator's own certificate can't be revoked: members would not hear of it",
                    hint="replace the CA instead: fedctl cert ca rotate",
                )
            return [_row(row) for row in rows], changed

        rows, changed = await self._database.write(change)
        self._good.clear()
        return rows, changed

    async def renew(self, caller: Caller, csr_pem: str) -> list[x509.Certificate]:
        """The caller's next certificate, for the key of a PKCS#10 request. The present one stays valid, for the
        answer may get lost.

        Raises IdentityError for a request that can't be signed, or a certificate that no longer counts.
        """
        subject = Subject(caller.federation, caller.role, caller.id)
        return await self.issue(subject, public_key_of_request(csr_pem), renews=caller.serial)

    async def renew_ended(
        self, certificate_pem: str, csr_pem: str, signature: bytes
    ) -> tuple[str, list[x509.Certificate]]:
        """A site and its next certificate, if it signed the request with the key of one that ended at most 30 days ago.

        Raises IdentityError that says what does not hold: unknown, revoked, of a dropped CA, ended too long ago, or
        not signed by that key.
        """
        old = certificates_from_pem(certificate_pem.encode(), "ended certificate")[0]
        subject, now, key = subject_of(old), self._clock(), public_key_of_request(csr_pem)
        authority = self._authority()
        caller = Caller(
            subject.federation,
            subject.role,
            subject.id,
            serial_text(old),
            old.not_valid_after_utc,
            authority.issuer_of(old),
        )
        if subject.federation != authority.federation or subject.role != "site":
            raise IdentityError(f"{subject.spiffe_id}: expected a site of {authority.federation!r}")
        self.check(caller)
        if now > old.not_valid_after_utc + GRACE:
            raise IdentityError(
                f"{caller}: certificate ended at {old.not_valid_after_utc.isoformat()}, more than "
                f"{GRACE.days} days ago",
                hint=_ENROL_AGAIN,
            )
        check_statement(old, ended_statement(subject.federation, caller.serial, csr_pem), signature)
        return subject.id, await self.issue(subject, key, renews=caller.serial)

    async def issue(
        self,
        subject: Subject,
        key: ec.EllipticCurvePublicKey,
        *,
        renews: str = "",
        hosts: tuple[str, ...] = (),
    ) -> list[x509.Certificate]:
        """Sign and record a certificate, followed by the issuing CA's.

        Raises IdentityError if `renews` was revoked meanwhile, or the issuing CA has ended.
        """
        now, authority = self._clock(), self._authority()
        chain = authority.issue(subject, key, now, hosts=hosts)

        def record(connection: sqlite3.Connection) -> None:
            if renews:
                row = connection.execute(f"{_SELECT} WHERE c.serial = ?", (renews,)).fetchone()
                if row is not None and row["revoked_at"]:
                    raise _revoked(_row(row))
            record_certificate(connection, chain[0], subject, now, renews=renews)

        await self._database.write(record)
        return chain

    def _find(self, serial: str) -> CertificateRow | None:
        query = f"{_SELECT} WHERE c.serial = ?"
        row = self._database.read(lambda c: c.execute(query, (serial,)).fetchone())
        return None if row is None else _row(row)


def _revoked(row: CertificateRow) -> IdentityError:
    why = f": {row.reason}" if row.reason else ""
    return IdentityError(
        f"{row.role}/{row.subject_id}: certificate {row.serial} was revoked at {row.revoked_at} "
        f"by {row.revoked_by}{why}",
        hint=_REVOKED_HINT,
    )


def _row(row: sqlite3.Row) -> CertificateRow:
    return CertificateRow(**{key: row[key] for key in row.keys()})  # noqa: SIM118 - a Row iterates over values
