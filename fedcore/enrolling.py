"""Enrolment, from the side of whoever is let in: a root that is pinned by its fingerprint, a key that stays here, and an
answer that is checked before anything is kept.

Nothing is sent before the root has been found to be the one that was named by its fingerprint.
"""

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.channel import open_enrollment_channel
from fedcore.credential import check_issued, join_address, split_address
from fedcore.enrollment_token import EnrollmentToken
from fedcore.errors import FingerprintError, IdentityError, ProtocolError
from fedcore.identity import Subject, check_validity, is_name
from fedcore.pki import (
    certificates_from_pem,
    certificates_to_pem,
    fingerprint,
    make_request,
    normalise_fingerprint,
)
from fedcore.status import from_rpc_error

# isort: split
import grpc

from fedcore.v1 import enrollment_pb2, enrollment_pb2_grpc

ReplyT = TypeVar("ReplyT")


@dataclass(frozen=True, slots=True)
class Issued:
    """What a member was given, found to be its own, below the pinned root and valid. `chain` begins with its
    certificate.
    """

    subject: Subject
    chain: list[x509.Certificate]
    roots: list[x509.Certificate]


def redeem_token(
    token: EnrollmentToken,
    key: ec.EllipticCurvePrivateKey,
    *,
    coordinator: str,
    ca_fingerprint: str,
    now: datetime,
    proxy: str | None = None,
) -> Issued:
    """Exchange a token for a certificate of `key`; `coordinator` is the HOST:PORT of the main port.

    Raises FingerprintError before anything is sent, UnreachableError, TokenError, IdentityError, ProtocolError.
    """
    root = pinned_root(certificates_from_pem(token.ca_pem.encode(), "enrolment token"), ca_fingerprint)
    host, _ = split_address(coordinator)
    role, name = ("operator", token.operator) if token.operator else ("site", token.site)
    request = enrollment_pb2.EnrollRequest(
        token_id=token.id, token_secret=token.secret, csr_pem=make_request(key, name).decode()
    )
    reply = ask_enrollment(
        join_address(host, token.port), root, lambda stub: stub.Enroll(request), proxy=proxy
    )
    got_role, got = reply.role or "site", reply.id or reply.site
    if (got_role, got) != (role, name):
        raise IdentityError(
            f"the coordinator enrolled {got!r:.80}, but the token is for {name!r}"
            + (f" ({got_role:.20} instead of {role})" if got_role != role else "")
        )
    return checked_reply(reply, role, name, key, root, now)


def pinned_root(certificates: list[x509.Certificate], ca_fingerprint: str) -> x509.Certificate:
    """The one certificate there is, if its fingerprint is the pinned one. Raises FingerprintError."""
    expected = normalise_fingerprint(ca_fingerprint)
    got = fingerprint(certificates[0])
    if len(certificates) != 1 or not hmac.compare_digest(got, expected):
        raise FingerprintError(
            f"the token's root certificate has the fingerprint {got}, expected {expected}; nothing was sent",
            hint="compare --ca-fingerprint with the operator by another way than the token came; "
            "if they differ, somebody may have replaced the token",
        )
    return certificates[0]


def ask_enrollment(
    address: str,
    root: x509.Certificate,
    ask: Callable[[enrollment_pb2_grpc.EnrollmentStub], ReplyT],
    *,
    proxy: str | None,
) -> ReplyT:
    """One question to the enrolment port at `address`, which must be below `root`. Raises FedimpresError."""
    with open_enrollment_channel(address, certificates_to_pem([root]), proxy=proxy) as channel:
        try:
            return ask(enrollment_pb2_grpc.EnrollmentStub(channel))
        except grpc.RpcError as error:
            raise from_rpc_error(error, f"enrolment at {address}") from error


def checked_reply(
    reply: enrollment_pb2.EnrollReply,
    role: str,
    name: str,
    key: ec.EllipticCurvePrivateKey,
    root: x509.Certificate,
    now: datetime,
) -> Issued:
    """The answer as certificates, if they are of this key, this member and the roots, and valid now.

    The roots to trust are the pinned one alone, or with the new one that the federation moves to: whoever answered has
    proved to be below the pinned root, so what it vouches for is as good. Raises IdentityError, ProtocolError.
    """
    if not is_name(reply.federation):
        raise ProtocolError(f"the coordinator calls its federation {reply.federation!r:.80}: no name")
    roots = certificates_from_pem(reply.ca_pem.encode(), "roots sent by the coordinator")
    if root not in roots:
        raise IdentityError("the coordinator sent roots without the one that is pinned")
    who, subject = f"certificate issued to {name}", Subject(reply.federation, role, name)
    chain = certificates_from_pem(reply.certificate_chain_pem.encode(), who)
    check_issued(chain, roots, key, subject, who)
    check_validity(chain[0].not_valid_before_utc, chain[0].not_valid_after_utc, now, who)
    return Issued(subject, chain, roots)
