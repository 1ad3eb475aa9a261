"""Who is calling, read from the certificate that TLS has verified; never from the message.

A certificate names its owner by exactly one URI: spiffe://FEDERATION/site/ID, /operator/ID or /coordinator.
gRPC hands over malformed SPIFFE ids as they are, so every part is checked here.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from cryptography import x509
from pydantic import TypeAdapter, ValidationError

from fedcore.errors import IdentityError
from fedcore.pki import BACKDATING, issuer_key_id, serial_text
from fedcore.plan import Name

CLIENT_ROLES = ("site", "operator")
_CACHED_CERTIFICATES = 4096
_NAME: TypeAdapter[str] = TypeAdapter(Name)
# What to do about a certificate that has ended, by its owner's role.
_RENEWAL = {
    "site": "its agent renews it by itself for 30 days more; later enrol again with a new token: fedagent enroll "
    "--force; the operator makes one: fedctl enroll token create",
    "operator": "ask an owner for a token: fedctl enroll token create --operator ID, then fedctl context enroll; or whoever "
    "runs the coordinator for a credential: fedserver operator --home DIR --id ID --out DIR",
    "coordinator": "the coordinator renews it when it starts: fedserver serve; check this machine's clock as well",
}
_SPIFFE = re.compile(
    r"spiffe://(?P<federation>[^/?#]+)/(?:(?P<role>site|operator)/(?P<id>[^/?#]+)|coordinator)"
)


@dataclass(frozen=True, slots=True)
class Subject:
    """The owner of a certificate. `id` is empty for the coordinator."""

    federation: str
    role: str
    id: str

    @property
    def spiffe_id(self) -> str:
        """The URI that stands in the certificate."""
        path = self.role if self.role == "coordinator" else f"{self.role}/{self.id}"
        return f"spiffe://{self.federation}/{path}"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call. `not_after` is when the certificate ends; `serial` names the certificate, `issuer` the key
    that signed it, both in hex.
    """

    federation: str
    role: str
    id: str
    serial: str
    not_after: datetime
    issuer: str = ""

    def __str__(self) -> str:
        """role/ID, for logs and messages."""
        return f"{self.role}/{self.id}"


@dataclass(frozen=True, slots=True)
class _Parsed:
    subject: Subject
    serial: str
    not_before: datetime
    not_after: datetime
    issuer: str


def is_name(text: str) -> bool:
    """Whether `text` may name a site, an operator or a federation (the pattern of fedcore.plan.Name)."""
    try:
        _NAME.validate_python(text, strict=True)
    except ValidationError:
        return False
    return True


def subject_of(certificate: x509.Certificate) -> Subject:
    """The owner that a certificate names.

    Raises IdentityError unless there is exactly one well-formed SPIFFE id.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise IdentityError(f"certificate has no readable subject alternative names: {error}") from error
    if len(uris) != 1:
        raise IdentityError(f"certificate names {len(uris)} URIs, expected exactly one SPIFFE id")
    match = _SPIFFE.fullmatch(uris[0])
    if match is None:
        raise IdentityError(f"certificate names {uris[0]!r:.120}, expected spiffe://FEDERATION/ROLE/ID")
    federation, role, subject_id = match["federation"], match["role"] or "coordinator", match["id"] or ""
    if not is_name(federation) or not (is_name(subject_id) or role == "coordinator"):
        raise IdentityError(f"certificate names {uris[0]!r:.120}: federation or ID is not a valid name")
    return Subject(federation, role, subject_id)


def caller_from_auth_context(
    auth_context: Mapping[str, Iterable[bytes]], federation: str, now: datetime
) -> Caller:
    """Who calls, from what grpc knows of the verified connection.

    Parsing is cached by certificate; federation, role and validity are checked on every call, because an open
    connection goes on after its certificate has ended. Raises IdentityError that says what is missing or
    wrong.
    """
    versions = [value.decode("ascii", "replace") for value in auth_context.get("ssl_tls_version", ())]
    if any(version != "TLSv1.3" for version in versions):
        raise IdentityError(f"the connection uses {', '.join(versions)}, expected TLSv1.3")
    certificates = list(auth_context.get("x509_pem_cert", ()))
    if len(certificates) != 1:
        raise IdentityError(
            "no client certificate was presented" if not certificates else "more than one client certificate",
            hint="call the coordinator's main port with the credential folder of a site or an operator",
        )
    parsed = _parse(certificates[0])
    subject = parsed.subject
    if subject.federation != federation:
        raise IdentityError(
            f"certificate {parsed.serial} is of federation {subject.federation!r}, expected {federation!r}"
        )
    if subject.role not in CLIENT_ROLES:
        raise IdentityError(
            f"certificate {parsed.serial} has the role {subject.role!r}, which makes no calls"
        )
    who = f"{subject.role}/{subject.id}"
    check_validity(parsed.not_before, parsed.not_after, now, who, role=subject.role)
    return Caller(
        subject.federation, subject.role, subject.id, parsed.serial, parsed.not_after, parsed.issuer
    )


def check_not_ended(caller: Caller, now: datetime) -> None:
    """Raise IdentityError once a caller's certificate has ended: for streams, which outlive the first check."""
    if now > caller.not_after:
        check_validity(caller.not_after, caller.not_after, now, str(caller), role=caller.role)


def check_validity(
    not_before: datetime, not_after: datetime, now: datetime, who: str, *, role: str = ""
) -> None:
    """Raise IdentityError unless `now` lies within a certificate's life. `role` is its owner's, for the hint."""
    clock = now.isoformat(timespec="seconds")
    if now > not_after:
        raise IdentityError(
            f"{who}: certificate ended at {not_after.isoformat()}, it is now {clock}",
            hint=_RENEWAL.get(role, "check this machine's clock"),
        )
    if now < not_before:
        raise IdentityError(
            f"{who}: certificate begins at {not_before.isoformat()}, it is now {clock}",
            hint=f"set the clocks: they differ by more than {int(BACKDATING.total_seconds() // 60)} minutes",
        )


@lru_cache(maxsize=_CACHED_CERTIFICATES)
def _parse(pem: bytes) -> _Parsed:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise IdentityError(f"client certificate can't be read: {error}") from error
    return _Parsed(
        subject_of(certificate),
        serial_text(certificate),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        issuer_key_id(certificate),
    )
