"""The Enrollment service: a token and a certificate request for a certificate.

Served on the enrolment port only.
"""

from typing import Any

import structlog

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.errors import ProtocolError
from fedcore.pki import certificates_to_pem
from fedserver.tokens import Tokens

# isort: split
from fedcore.v1 import enrollment_pb2, enrollment_pb2_grpc

_MAX_REQUEST_CHARACTERS = 16_384
_log = structlog.get_logger("fedserver.enrollment")


class EnrollmentService(enrollment_pb2_grpc.EnrollmentServicer):
    """Answers `fedagent enroll`. `coordinator` is the HOST:PORT of the main port, as in fedserver.toml."""

    def __init__(self, tokens: Tokens, coordinator: str) -> None:
        self._tokens = tokens
        self._coordinator = coordinator

    async def Enroll(  # noqa: N802 - the name in the contract
        self, request: enrollment_pb2.EnrollRequest, context: Any
    ) -> enrollment_pb2.EnrollReply:
        """Redeem the token and issue the certificate, in one transaction.

        Raises TokenError, IdentityError, ProtocolError; none of them uses the token up.
        """
        if len(request.csr_pem) + len(request.token_id) + len(request.token_secret) > _MAX_REQUEST_CHARACTERS:
            raise ProtocolError(f"enrolment request is longer than {_MAX_REQUEST_CHARACTERS} characters")
        redeemed = await self._tokens.redeem(request.token_id, request.token_secret, request.csr_pem)
        _log.info("site enrolled", site=redeemed.site, serial=redeemed.serial, peer=context.peer())
        return enrollment_pb2.EnrollReply(
            site=redeemed.site,
            federation=self._tokens.authority.federation,
            certificate_chain_pem=certificates_to_pem(redeemed.chain).decode(),
            ca_pem=self._tokens.authority.root_pem,
            coordinator=self._coordinator,
        )
