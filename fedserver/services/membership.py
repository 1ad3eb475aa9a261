"""The Membership service: tokens for operators, and the decisions on sites' requests. Message <-> tables, nothing else."""

from typing import Any

import structlog

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.errors import ProtocolError
from fedcore.text import printable
from fedcore.v1 import admin_pb2, membership_pb2, membership_pb2_grpc
from fedserver.call_audit import note
from fedserver.enrollment_requests import APPROVED, DENIED, WAITING, EnrollmentRequests, RequestRow
from fedserver.interceptors import caller_of
from fedserver.tokens import TOKEN_TTL_S, Tokens

_MAX_REASON = 500
log = structlog.get_logger(__name__)


class MembershipService(membership_pb2_grpc.MembershipServicer):
    """Lets operators and sites in."""

    def __init__(self, tokens: Tokens, requests: EnrollmentRequests) -> None:
        self._tokens = tokens
        self._requests = requests

    async def CreateOperatorToken(  # noqa: N802 - the name in the contract
        self, request: membership_pb2.CreateOperatorTokenRequest, context: Any
    ) -> admin_pb2.CreateTokenReply:
        """Make a single-use token for an operator, and grant the roles named."""
        note(f"operator/{request.operator}", granted=" ".join(request.roles))
        new = await self._tokens.create_operator(
            request.operator, request.ttl_s or TOKEN_TTL_S, caller_of(context).id, tuple(request.roles)
        )
        note(expires_at=new.expires_at.isoformat(timespec="seconds"))
        return admin_pb2.CreateTokenReply(
            token=new.token,
            ca_fingerprint=new.ca_fingerprint,
            coordinator=new.coordinator,
            expires_at=new.expires_at.isoformat(timespec="seconds"),
        )

    async def ListEnrollments(  # noqa: N802
        self, request: membership_pb2.ListEnrollmentsRequest, context: Any
    ) -> membership_pb2.ListEnrollmentsReply:
        """The requests that there are."""
        if request.state not in ("", WAITING, APPROVED, DENIED):
            raise ProtocolError(f"state {request.state!r:.50}: expected {WAITING}, {APPROVED} or {DENIED}")
        rows = self._requests.rows(prefix=request.key_fingerprint.lower(), state=request.state)
        return membership_pb2.ListEnrollmentsReply(requests=map(_message, rows))

    async def ApproveEnrollment(  # noqa: N802
        self, request: membership_pb2.DecideEnrollmentRequest, context: Any
    ) -> membership_pb2.EnrollmentRequest:
        """Let a site in."""
        caller = caller_of(context)
        note(f"key/{request.key_fingerprint}")
        row = await self._requests.approve(request.key_fingerprint, caller.id)
        note(f"site/{row.site}", key=row.key_fingerprint, serial=row.serial, address=row.address)
        log.info(
            "request approved", site=row.site, by=str(caller), key=row.key_fingerprint, serial=row.serial
        )
        return _message(row)

    async def DenyEnrollment(  # noqa: N802
        self, request: membership_pb2.DecideEnrollmentRequest, context: Any
    ) -> membership_pb2.EnrollmentRequest:
        """Refuse a request."""
        caller = caller_of(context)
        reason = printable(request.reason, _MAX_REASON)
        note(f"key/{request.key_fingerprint}", reason=reason)
        row = await self._requests.deny(request.key_fingerprint, caller.id, reason)
        note(f"site/{row.site}", key=row.key_fingerprint, address=row.address)
        log.info("request denied", site=row.site, by=str(caller), key=row.key_fingerprint, reason=reason)
        return _message(row)


def _message(row: RequestRow) -> membership_pb2.EnrollmentRequest:
    return membership_pb2.EnrollmentRequest(
        key_fingerprint=row.key_fingerprint,
        site=row.site,
        address=row.address,
        requested_at=row.requested_at,
        expires_at=row.expires_at,
        state=row.state,
        decided_at=row.decided_at,
        decided_by=row.decided_by,
        reason=row.reason,
        serial=row.serial,
        enrolled_at=row.enrolled_at,
    )
