"""The Enrollment service: a token, or the key of an ended certificate, and a certificate request for a certificate.

Served on the enrolment port only.
"""

from typing import Any

import structlog

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.errors import ProtocolError
from fedcore.pki import certificates_to_pem, serial_text
from fedserver.call_audit import note
from fedserver.certificates import Certificates
from fedserver.tokens import Tokens

# isort: split
from fedcore.v1 import certificates_pb2, enrollment_pb2, enrollment_pb2_grpc

_MAX_REQUEST_CHARACTERS = 16_384
_MAX_SIGNATURE_BYTES = 200
_log = structlog.get_logger("fedserver.enrollment")


class EnrollmentService(enrollment_pb2_grpc.EnrollmentServicer):
    """Answers `fedagent enroll`, and agents whose certificate has ended. `coordinator` is the HOST:PORT of the main
    port, as in fedserver.toml.
    """

    def __init__(
        self, tokens: Tokens, certificates: Certificates, coordinator: str, enroll_port: int = 0
    ) -> None:
        self._tokens = tokens
        self._certificates = certificates
        self._enroll_port = enroll_port
        self._coordinator = coordinator

    async def Enroll(  # noqa: N802 - the name in the contract
        self, request: enrollment_pb2.EnrollRequest, context: Any
    ) -> enrollment_pb2.EnrollReply:
        """Redeem the token and issue the certificate, in one transaction.

        Raises TokenError, IdentityError, ProtocolError; none of them uses the token up.
        """
        if len(request.csr_pem) + len(request.token_id) + len(request.token_secret) > _MAX_REQUEST_CHARACTERS:
            raise ProtocolError(f"enrolment request is longer than {_MAX_REQUEST_CHARACTERS} characters")
        note(token=request.token_id)
        redeemed = await self._tokens.redeem(request.token_id, request.token_secret, request.csr_pem)
        note(f"site/{redeemed.site}", serial=redeemed.serial)
        _log.info("site enrolled", site=redeemed.site, serial=redeemed.serial, peer=context.peer())
        return enrollment_pb2.EnrollReply(
            site=redeemed.site,
            federation=self._tokens.authority.federation,
            certificate_chain_pem=certificates_to_pem(redeemed.chain).decode(),
            ca_pem=self._tokens.authority.roots_pem,
            coordinator=self._coordinator,
        )

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
