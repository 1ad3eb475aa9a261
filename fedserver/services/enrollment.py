"""The Enrollment service: a token, an operator's approval, or the key of an ended certificate, and a certificate request
for a certificate.

Served on the enrolment port only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.errors import ConfigError, ConflictError, IdentityError, ProtocolError
from fedcore.pki import certificates_to_pem, serial_text
from fedserver.call_audit import note, nothing_changed
from fedserver.certificates import Certificates
from fedserver.enrollment_requests import APPROVED, EnrollmentRequests, RequestRow
from fedserver.limits import Limits, address_of
from fedserver.tokens import Tokens

# isort: split
from fedcore.v1 import certificates_pb2, enrollment_pb2, enrollment_pb2_grpc

_MAX_REQUEST_CHARACTERS = 16_384
_MAX_SIGNATURE_BYTES = 200
_log = structlog.get_logger("fedserver.enrollment")


class EnrollmentService(enrollment_pb2_grpc.EnrollmentServicer):
    """Answers whoever enrols with a token or by a request, and agents whose certificate has ended. `coordinator` is the
    HOST:PORT of the main port, as in fedserver.toml.

    What is refused counts against the caller's address, and once that is too often it is refused as OverloadedError. What
    is good is taken at any time, so whoever guesses shuts nobody out who shares the address.
    """

    def __init__(
        self,
        tokens: Tokens,
        certificates: Certificates,
        requests: EnrollmentRequests,
        limits: Limits,
        coordinator: str,
        enroll_port: int = 0,
    ) -> None:
        self._tokens = tokens
        self._certificates = certificates
        self._requests = requests
        self._limits = limits
        self._enroll_port = enroll_port
        self._coordinator = coordinator

    async def Enroll(  # noqa: N802 - the name in the contract
        self, request: enrollment_pb2.EnrollRequest, context: Any
    ) -> enrollment_pb2.EnrollReply:
        """Redeem the token and issue the certificate, in one transaction.

        Raises TokenError, IdentityError, ProtocolError, OverloadedError; none of them uses the token up.
        """
        if len(request.csr_pem) + len(request.token_id) + len(request.token_secret) > _MAX_REQUEST_CHARACTERS:
            raise ProtocolError(f"enrolment request is longer than {_MAX_REQUEST_CHARACTERS} characters")
        note(token=request.token_id)
        with self._counting(context):
            redeemed = await self._tokens.redeem(request.token_id, request.token_secret, request.csr_pem)
        subject = redeemed.subject
        who = f"{subject.role}/{subject.id}"
        note(who, serial=redeemed.serial)
        _log.info("member enrolled", who=who, serial=redeemed.serial, peer=context.peer())
        reply = self._reply(certificates_to_pem(redeemed.chain).decode())
        reply.role, reply.id = subject.role, subject.id
        reply.site = subject.id if subject.role == "site" else ""
        return reply

    async def RequestEnrollment(  # noqa: N802
        self, request: enrollment_pb2.RequestEnrollmentRequest, context: Any
    ) -> enrollment_pb2.EnrollmentState:
        """File a site's request to be let in, for an operator to decide.

        Raises ConfigError, IdentityError, ConflictError, OverloadedError, ProtocolError.
        """
        if len(request.csr_pem) + len(request.site) > _MAX_REQUEST_CHARACTERS:
            raise ProtocolError(f"enrolment request is longer than {_MAX_REQUEST_CHARACTERS} characters")
        address = address_of(context.peer())
        with self._counting(context):
            row, new = await self._requests.file(request.site, request.csr_pem, address)
        if new:
            note(f"site/{row.site}", key=row.key_fingerprint)
            _log.info("site asks to be let in", site=row.site, key=row.key_fingerprint, peer=context.peer())
        else:
            nothing_changed()
        return self._state(row)

    async def CheckEnrollment(  # noqa: N802
        self, request: enrollment_pb2.CheckEnrollmentRequest, context: Any
    ) -> enrollment_pb2.EnrollmentState:
        """What became of a request. Raises NotFoundError."""
        return self._state(self._requests.one(request.key_fingerprint))

    def _state(self, row: RequestRow) -> enrollment_pb2.EnrollmentState:
        state = enrollment_pb2.EnrollmentState(state=row.state, reason=row.reason, expires_at=row.expires_at)
        if row.state == APPROVED:
            state.enrolled.CopyFrom(self._reply(row.chain_pem))
            state.enrolled.role, state.enrolled.id, state.enrolled.site = "site", row.site, row.site
        return state

    def _reply(self, chain_pem: str) -> enrollment_pb2.EnrollReply:
        authority = self._tokens.authority
        return enrollment_pb2.EnrollReply(
            federation=authority.federation,
            certificate_chain_pem=chain_pem,
            ca_pem=authority.roots_pem,
            coordinator=self._coordinator,
        )

    @contextmanager
    def _counting(self, context: Any) -> Iterator[None]:
        """Count what is refused against the caller's address."""
        try:
            yield
        except (IdentityError, ConfigError, ConflictError):
            self._limits.enrolment_failed(context.peer())
            raise

    async def RenewEnded(  # noqa: N802 - the name in the contract
        self, request: enrollment_pb2.RenewEndedRequest, context: Any
    ) -> certificates_pb2.RenewReply:
        """Issue the next certificate of a site whose last one ended lately and was not revoked.

        Raises IdentityError, ProtocolError.
        """
        if (
            len(request.csr_pem) + len(request.certificate_pem) > _MAX_REQUEST_CHARACTERS
            or len(request.signature) > _MAX_SIGNATURE_BYTES
        ):
            raise ProtocolError(f"renewal request is longer than {_MAX_REQUEST_CHARACTERS} characters")
        with self._counting(context):
            site, chain = await self._certificates.renew_ended(
                request.certificate_pem, request.csr_pem, request.signature
            )
        note(f"site/{site}", serial=serial_text(chain[0]))
        _log.info("ended certificate renewed", site=site, serial=serial_text(chain[0]), peer=context.peer())
        return certificates_pb2.RenewReply(
            certificate_chain_pem=certificates_to_pem(chain).decode(),
            ca_pem=self._certificates.authority.roots_pem,
            enroll_port=self._enroll_port,
        )
