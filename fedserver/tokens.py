"""Enrolment tokens: single use, short-lived, bound to the name of a site or of an operator.

Only the SHA-256 of the secret is stored.

Redeeming a token and issuing the certificate are one transaction: a failed request leaves the token as it
was, and two requests with the same token can't both succeed.
"""

import hashlib
import hmac
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cryptography import x509

from fedcore.database import Database
from fedcore.enrollment_token import EnrollmentToken
from fedcore.errors import TokenError, UsageError
from fedcore.identity import Subject, is_name
from fedcore.pki import public_key_of_request
from fedserver.authority import Authority
from fedserver.grants import check_grant, grant
from fedserver.registry import enrol, record_certificate, rfc3339, utc_now

TOKEN_TTL_S = 15 * 60.0
MAX_TTL_S = 7 * 24 * 3600.0
_ASK_AGAIN = "ask for a new token: fedctl enroll token create --site SITE, or --operator NAME"


@dataclass(frozen=True, slots=True)
class Redeemed:
    """What a token was exchanged for. `chain` is the member's certificate and the issuing CA's."""

    subject: Subject
    chain: list[x509.Certificate]
    serial: str


@dataclass(frozen=True, slots=True)
class NewToken:
    """What is handed over: the token, and what to check the coordinator by."""

    token: str = field(repr=False)
    expires_at: datetime
    ca_fingerprint: str
    coordinator: str


class Tokens:
    """Makes and redeems enrolment tokens. `authority` is asked for at each use, for it changes while the program runs;
    `coordinator` is the HOST:PORT that sites dial.
    """

    def __init__(
        self,
        database: Database,
        authority: Callable[[], Authority],
        *,
        coordinator: str,
        enroll_port: int,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._database = database
        self._authority = authority
        self._coordinator = coordinator
        self._enroll_port = enroll_port
        self._clock = clock

    @property
    def authority(self) -> Authority:
        """Who signs what tokens are exchanged for."""
        return self._authority()

    async def create(self, site: str, ttl_s: float, created_by: str = "") -> NewToken:
        """Make a token for `site` that ends after `ttl_s` seconds.

        Raises UsageError for a name or a lifetime that is not allowed.
        """
        if not is_name(site):
            raise UsageError(
                f"{site!r:.80} is not a site name",
                hint="lower-case letters, digits, '.', '_' and '-', 63 at most, first and last a letter or digit",
            )
        return await self._create("site", site, ttl_s, created_by, ())

    async def create_operator(
        self, operator: str, ttl_s: float, created_by: str, roles: Sequence[str] = ()
    ) -> NewToken:
        """Make a token for an operator, and grant the operator `roles`, in one transaction.

        Raises UsageError for a name, a lifetime or a role that is not allowed; nothing is granted then.
        """
        check_grant(operator, *roles)
        return await self._create("operator", operator, ttl_s, created_by, roles)

    async def _create(
        self, role: str, name: str, ttl_s: float, created_by: str, roles: Sequence[str]
    ) -> NewToken:
        if not 0 < ttl_s <= MAX_TTL_S:
            raise UsageError(
                f"token lifetime of {ttl_s:.10g} s: expected above 0, at most {MAX_TTL_S:g} s (7 days)"
            )
        now = self._clock()
        token = EnrollmentToken(
            id=secrets.token_hex(8),
            secret=secrets.token_urlsafe(32),
            site=name if role == "site" else "",
            port=self._enroll_port,
            ca_pem=self.authority.root_pem,
            operator=name if role == "operator" else "",
        )
        expires_at = now + timedelta(seconds=ttl_s)
        row = (token.id, _digest(token.secret), role, name, rfc3339(now), created_by, rfc3339(expires_at))

        def write(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT INTO tokens (id, secret_sha256, role, site, created_at, created_by, expires_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            for one in roles:
                grant(connection, name, one, now, created_by)

        await self._database.write(write)
        return NewToken(token.encode(), expires_at, self.authority.root_fingerprint, self._coordinator)

    async def redeem(self, token_id: str, secret: str, csr_pem: str) -> Redeemed:
        """Exchange a token and a certificate request for a certificate; a site is enrolled by it.

        Raises TokenError for a token that is unknown, used or expired (the same words for an unknown id and a
        wrong secret), IdentityError for a request that can't be signed. What is refused changes nothing.
        """
        now = self._clock()
        # A guess costs one read, never a write: guesses don't queue before those who enrol.
        self._database.read(lambda connection: _bearer(connection, token_id, secret, now))
        return await self._database.write(
            lambda connection: _redeem(connection, self.authority, token_id, secret, csr_pem, now)
        )


def _redeem(
    connection: sqlite3.Connection,
    authority: Authority,
    token_id: str,
    secret: str,
    csr_pem: str,
    now: datetime,
) -> Redeemed:
    role, name = _bearer(connection, token_id, secret, now)
    subject = Subject(authority.federation, role, name)
    chain = authority.issue(subject, public_key_of_request(csr_pem), now)
    serial = record_certificate(connection, chain[0], subject, now)
    if role == "site":
        enrol(connection, name, now)
    connection.execute(
        "UPDATE tokens SET used_at = ?, serial = ? WHERE id = ?", (rfc3339(now), serial, token_id)
    )
    return Redeemed(subject, chain, serial)


def _bearer(connection: sqlite3.Connection, token_id: str, secret: str, now: datetime) -> tuple[str, str]:
    """Role and name of whom a token lets in. Raises TokenError for one that is unknown, used or expired."""
    row = connection.execute(
        "SELECT secret_sha256, role, site, expires_at, used_at FROM tokens WHERE id = ?", (token_id,)
    ).fetchone()
    # Compared even if there is no such token, so that time does not tell which ids exist.
    stored = row["secret_sha256"] if row is not None else _digest("")
    if not hmac.compare_digest(stored, _digest(secret)) or row is None:
        raise TokenError("the enrolment token is not known here", hint=_ASK_AGAIN)
    name: str = row["site"]
    if row["used_at"] is not None:
        raise TokenError(f"the enrolment token for {name} was used at {row['used_at']}", hint=_ASK_AGAIN)
    if rfc3339(now) >= row["expires_at"]:
        raise TokenError(f"the enrolment token for {name} expired at {row['expires_at']}", hint=_ASK_AGAIN)
    return row["role"], name


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
