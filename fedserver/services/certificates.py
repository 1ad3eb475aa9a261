"""What members ask of the coordinator about certificates: message <-> registry, nothing else."""

import itertools
from datetime import UTC, datetime
from typing import Any

import structlog

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.errors import ProtocolError
from fedcore.pki import certificates_to_pem, fingerprint, serial_text
from fedcore.text import printable
from fedcore.v1 import certificates_pb2, certificates_pb2_grpc
from fedserver.call_audit import note
from fedserver.certificates import CertificateRow, Certificates, Owner
from fedserver.interceptors import caller_of
from fedserver.pages import page
from fedserver.rotation import Rotation

MAX_REQUEST_CHARACTERS = 16_384
_MAX_REASON = 500
_ROLES = ("site", "operator", "coordinator")
log = structlog.get_logger(__name__)


class CertificatesService(certificates_pb2_grpc.CertificatesServicer):
    """Renewal for every member; listing, revocation and the change of the CA for operators. `enroll_port` is told to
    those who renew.
    """

    def __init__(self, certificates: Certificates, enroll_port: int, rotation: Rotation) -> None:
        self._certificates = certificates
        self._enroll_port = enroll_port
        self._rotation = rotation

    async def Renew(  # noqa: N802
        self, request: certificates_pb2.RenewRequest, context: Any
    ) -> certificates_pb2.RenewReply:
        """Issue the caller's next certificate."""
        caller = caller_of(context)
        if len(request.csr_pem) > MAX_REQUEST_CHARACTERS:
            raise ProtocolError(f"{caller}: request is longer than {MAX_REQUEST_CHARACTERS} characters")
        chain = await self._certificates.renew(caller, request.csr_pem)
        note(str(caller), serial=serial_text(chain[0]), renews=caller.serial)
        log.info("certificate renewed", owner=str(caller), serial=serial_text(chain[0]), renews=caller.serial)
        return certificates_pb2.RenewReply(
            certificate_chain_pem=certificates_to_pem(chain).decode(),
            ca_pem=self._certificates.authority.roots_pem,
            enroll_port=self._enroll_port,
        )

    async def ListCertificates(  # noqa: N802
        self, request: certificates_pb2.ListCertificatesRequest, context: Any
    ) -> certificates_pb2.ListCertificatesReply:
        """What was issued, the newest first."""
        if request.role and request.role not in _ROLES:
            raise ProtocolError(f"role {request.role!r:.50}: expected one of {', '.join(_ROLES)}")
        if request.subject and not request.role:
            raise ProtocolError("a subject was named without its role")
        owner = Owner(request.role, request.subject or None) if request.role else None
        now = datetime.now(UTC)
        rows = self._certificates.rows(prefix=request.serial.lower(), owner=owner)
        if request.page_token:
            rows = list(itertools.dropwhile(lambda row: row.serial != request.page_token, rows))[1:]
        kept = (row for row in rows if not request.current or row.state(now) == "valid")
        items = ((row.serial, certificate_message(row, now)) for row in kept)
        found, rest = page(items, certificates_pb2.Certificate.ByteSize)
        return certificates_pb2.ListCertificatesReply(certificates=found, next_page_token=rest)

    async def RevokeCertificates(  # noqa: N802
        self, request: certificates_pb2.RevokeCertificatesRequest, context: Any
    ) -> certificates_pb2.RevokeCertificatesReply:
        """End certificates: one with its successors, or all of an owner."""
        caller = caller_of(context)
        reason = printable(request.reason, _MAX_REASON)
        if bool(request.serial) == bool(request.subject):
            raise ProtocolError("revoke: expected either a serial number or an owner")
        if request.serial:
            rows, changed = await self._certificates.revoke(request.serial, by=caller, reason=reason)
        elif request.role in ("site", "operator"):
            owner = Owner(request.role, request.subject)
            rows, changed = await self._certificates.revoke_all(owner, by=caller, reason=reason)
        else:
            raise ProtocolError(f"revoke: role {request.role!r:.50}, expected site or operator")
        owners = sorted({f"{row.role}/{row.subject_id}" for row in rows})
        note(" ".join(owners), reason=reason, revoked=changed, serials=" ".join(row.serial for row in rows))
        log.warning(
            "certificates revoked",
            by=str(caller),
            reason=reason,
            revoked=changed,
            serials=[row.serial for row in rows],
            owners=owners,
        )
        now = datetime.now(UTC)
        return certificates_pb2.RevokeCertificatesReply(
            certificates=[certificate_message(row, now) for row in rows], revoked=changed
        )

    async def GetAuthority(  # noqa: N802
        self, request: certificates_pb2.GetAuthorityRequest, context: Any
    ) -> certificates_pb2.Authority:
        """The CA as it stands."""
        return self._authority()

    async def RotateAuthority(  # noqa: N802
        self, request: certificates_pb2.RotateAuthorityRequest, context: Any
    ) -> certificates_pb2.Authority:
        """Begin or finish the move to a new CA."""
        caller = caller_of(context)
        note("ca", finish=request.finish, force=request.force)
        if request.finish:
            await self._rotation.finish(caller, force=request.force)
        else:
            await self._rotation.begin()
        log.warning(
            "the old CA was dropped" if request.finish else "the federation moves to a new CA",
            by=str(caller),
            root=fingerprint(self._certificates.authority.root),
        )
        return self._authority()

    def _authority(self) -> certificates_pb2.Authority:
        authority, now = self._certificates.authority, datetime.now(UTC)
        message = certificates_pb2.Authority(
            root_fingerprint=fingerprint(authority.root),
            root_not_after=authority.root.not_valid_after_utc.isoformat(),
            issuing_not_after=authority.issuing.certificate.not_valid_after_utc.isoformat(),
            root_offline=self._rotation.offline,
            waiting=[certificate_message(row, now) for row in self._rotation.waiting()],
        )
        if authority.previous is not None:
            message.previous_fingerprint = fingerprint(authority.previous.root)
        return message


def certificate_message(row: CertificateRow, now: datetime) -> certificates_pb2.Certificate:
    """A row as it goes over the wire, with its state at `now`."""
    return certificates_pb2.Certificate(
        serial=row.serial,
        role=row.role,
        subject=row.subject_id,
        not_before=row.not_before,
        not_after=row.not_after,
        issued_at=row.issued_at,
        state=row.state(now),
        revoked_at=row.revoked_at,
        revoked_by=row.revoked_by,
        reason=row.reason,
        renews=row.renews,
        replaced_by=row.replaced_by,
        issuer=row.issuer,
    )
