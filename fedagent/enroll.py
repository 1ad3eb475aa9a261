"""Enrolment, seen from the site: a key that never leaves it, a token, a pinned root; in the end a
credential folder.

Nothing is sent before the root in the token has been found to be the one that the operator named by its
fingerprint.
"""

import hmac
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedagent.config import AgentConfig, AgentHome
from fedagent.line import Line, explain_foreign_certificate
from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.channel import open_enrollment_channel
from fedcore.config import load_config
from fedcore.credential import check_issued, join_address, split_address, write_credential
from fedcore.enrollment_token import EnrollmentToken, decode_token
from fedcore.errors import (
    ConflictError,
    FingerprintError,
    ForeignCertificateError,
    IdentityError,
    ProtocolError,
)
from fedcore.identity import Subject, check_validity, is_name
from fedcore.pki import certificates_from_pem, fingerprint, make_request, new_key, normalise_fingerprint
from fedcore.private_files import make_folder, write_file
from fedcore.status import from_rpc_error

# isort: split
import grpc

from fedcore.v1 import enrollment_pb2, enrollment_pb2_grpc

DEFAULT_CONFIG = """\
# What this site does, and what it allows. Checked by: fedagent check-config --home DIR

[data]
# npz | folder | csv | medmnist, or the name of an installed reader.
kind = "npz"
# path = "/srv/images/train.npz"            # `fedagent serve --data PATH` overrides it
# class_names = ["benign", "malignant"]     # what the numbers in an npz file mean
# validation_fraction = 0.1                 # held out where the data has no split of its own
# test_fraction = 0.2

[compute]
device = "auto"          # auto | cpu | cuda | cuda:N
threads = 0              # 0: PyTorch's choice

[policy]
# Counts per class of held-out images would tell the coordinator this site's class histogram.
share_class_metrics = false

[privacy]
# Compare impressions with this site's images, and refuse those that come too near one (docs/privacy.md).
check_impressions = true
"""


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What enrolment gave this site."""

    site: str
    federation: str
    not_after: datetime
    credential: Path


def enroll(
    home: Path,
    *,
    coordinator: str,
    token: str,
    ca_fingerprint: str,
    proxy: str | None = None,
    force: bool = False,
) -> Enrolled:
    """Exchange a token for this site's credential in `home`, and write a commented agent.toml if there is
    none.

    Raises ConflictError if the home is enrolled already (unless `force`), TokenError, FingerprintError,
    UnreachableError and IdentityError. Whatever is raised, credential and configuration are as they were.
    """
    paths = AgentHome(home)
    if paths.credential.exists() and not force:
        raise ConflictError(
            f"{home} is enrolled already; nothing was changed", hint="use --force to replace its credential"
        )
    host, _ = split_address(coordinator)
    parsed = decode_token(token)
    root = _pinned_root(parsed, ca_fingerprint)
    if proxy is None and paths.config.is_file():
        proxy = load_config(paths.config, AgentConfig).proxy
    was_there = home.exists()
    if not was_there:
        make_folder(home)  # before the token is used up, in case it can't be made
    try:
        key = new_key()
        reply = _ask(join_address(host, parsed.port), parsed, key, proxy)
        roots = _roots(reply, root)
        chain = _checked_chain(reply, parsed, key, roots)
        write_credential(
            paths.credential,
            coordinator=coordinator.strip(),
            subject=Subject(reply.federation, "site", reply.site),
            key=key,
            chain=chain,
            roots=roots,
            enroll_port=parsed.port,
            replace=force,
        )
    except BaseException:
        if not was_there and not any(home.iterdir()):
            home.rmdir()
        raise
    if not paths.config.exists():
        write_file(paths.config, _config_toml(proxy).encode())
    return Enrolled(reply.site, reply.federation, chain[0].not_valid_after_utc, paths.credential)


def _pinned_root(token: EnrollmentToken, ca_fingerprint: str) -> x509.Certificate:
    """The token's root certificate, if it is the pinned one. Raises FingerprintError."""
    expected = normalise_fingerprint(ca_fingerprint)
    certificates = certificates_from_pem(token.ca_pem.encode(), "enrolment token")
    got = fingerprint(certificates[0])
    if len(certificates) != 1 or not hmac.compare_digest(got, expected):
        raise FingerprintError(
            f"the token's root certificate has the fingerprint {got}, expected {expected}; nothing was sent",
            hint="compare --ca-fingerprint with the operator by another way than the token came; "
            "if they differ, somebody may have replaced the token",
        )
    return certificates[0]


def _ask(
    address: str, token: EnrollmentToken, key: ec.EllipticCurvePrivateKey, proxy: str | None
) -> enrollment_pb2.EnrollReply:
    request = enrollment_pb2.EnrollRequest(
        token_id=token.id, token_secret=token.secret, csr_pem=make_request(key, token.site).decode()
    )
    with open_enrollment_channel(address, token.ca_pem.encode(), proxy=proxy) as channel:
        try:
            return enrollment_pb2_grpc.EnrollmentStub(channel).Enroll(request)
        except grpc.RpcError as error:
            failure = from_rpc_error(error, f"enrolment at {address}")
            if isinstance(failure, ForeignCertificateError):
                line = Line(*split_address(address), proxy)
                failure = explain_foreign_certificate(failure, line, token.ca_pem.encode())
            raise failure from error


def _roots(reply: enrollment_pb2.EnrollReply, pinned: x509.Certificate) -> list[x509.Certificate]:
    """The roots to trust: the pinned one alone, or with the new one that the federation moves to.

    Whoever answers has proved to be below the pinned root, so what it vouches for is as good. Raises IdentityError if
    the pinned root is not among them.
    """
    roots = certificates_from_pem(reply.ca_pem.encode(), "roots sent by the coordinator")
    if pinned not in roots:
        raise IdentityError("the coordinator sent roots without the one that is pinned")
    return roots


def _checked_chain(
    reply: enrollment_pb2.EnrollReply,
    token: EnrollmentToken,
    key: ec.EllipticCurvePrivateKey,
    roots: list[x509.Certificate],
) -> list[x509.Certificate]:
    """The reply's certificates, if they are of this key, this site and the roots, and valid now."""
    if reply.site != token.site:
        raise IdentityError(
            f"the coordinator enrolled {reply.site!r:.80}, but the token is for {token.site!r}"
        )
    if not is_name(reply.federation):
        raise ProtocolError(f"the coordinator calls its federation {reply.federation!r:.80}: no name")
    who = f"certificate issued to {token.site}"
    chain = certificates_from_pem(reply.certificate_chain_pem.encode(), who)
    check_issued(chain, roots, key, Subject(reply.federation, "site", reply.site), who)
    check_validity(chain[0].not_valid_before_utc, chain[0].not_valid_after_utc, datetime.now(UTC), who)
    return chain


def _config_toml(proxy: str | None) -> str:
    line = f'proxy = "{proxy}"\n' if proxy else '# proxy = "http://proxy.example.org:3128"\n'
    head, separator, rest = DEFAULT_CONFIG.partition("\n\n")
    about = "# HTTP CONNECT proxy to the coordinator; the environment's (https_proxy, ...) is never used.\n"
    return head + separator + about + line + "\n" + rest
