"""Enrolment tokens, certificate requests, certificates and keys."""

import base64
import json
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509 import CertificateSigningRequestBuilder, Name

from fedcore.enrollment_token import EnrollmentToken, decode_token
from fedcore.errors import ConfigError, IdentityError, TokenError
from fedcore.identity import subject_of
from fedcore.pki import (
    certificates_from_pem,
    certificates_to_pem,
    fingerprint,
    issuer_key_id,
    key_from_pem,
    key_id,
    key_to_pem,
    make_issuing_ca,
    make_request,
    make_root,
    new_key,
    public_key_of_request,
    root_of,
    serial_text,
    verify_chain,
)
from tests.fuzz.target import BINARY_WORDS, TEXT_WORDS, Target, only

_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_TOKEN = EnrollmentToken("0" * 16, "s" * 32, "clinic-a", 8444, "-----BEGIN CERTIFICATE-----")


def check_token(data: bytes, folder: Path) -> None:
    """The JSON inside, and the string as a whole."""
    for text in (base64.urlsafe_b64encode(data).decode().rstrip("="), data.decode(errors="surrogateescape")):
        with only(TokenError):
            token = decode_token(text)
            assert decode_token(token.encode()) == token


def _tokens() -> list[bytes]:
    text = _TOKEN.encode()
    return [base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), text.encode()]


def _pem(kind: str, der: bytes) -> str:
    body = base64.encodebytes(der).decode()
    return f"-----BEGIN {kind}-----\n{body}-----END {kind}-----\n"


def _der(pem: bytes) -> bytes:
    return base64.b64decode(b"".join(line for line in pem.splitlines() if not line.startswith(b"-")))


def check_request(data: bytes, folder: Path) -> None:
    """The DER inside, and the PEM as a whole."""
    for text in (_pem("CERTIFICATE REQUEST", data), data.decode(errors="surrogateescape")):
        with only(IdentityError):
            public_key_of_request(text)


def _requests() -> list[bytes]:
    odd = ed25519.Ed25519PrivateKey.generate()
    brief = CertificateSigningRequestBuilder().subject_name(Name([]))
    others = [brief.sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()), brief.sign(odd, None)]
    made = make_request(new_key(), "clinic-a")
    return [_der(made), made, *(one.public_bytes(serialization.Encoding.DER) for one in others)]


def check_certificates(data: bytes, folder: Path) -> None:
    for pem in (_pem("CERTIFICATE", data).encode(), data):
        with only(IdentityError):
            chain = certificates_from_pem(pem, "certificate")
            for certificate in chain:
                serial_text(certificate)
                fingerprint(certificate)
                with only(IdentityError):
                    subject_of(certificate)
                with only(IdentityError):
                    key_id(certificate)
                with only(IdentityError):
                    issuer_key_id(certificate)
            verify_chain(chain, root_of(chain, chain), "somebody")


def _certificates() -> list[bytes]:
    root = make_root("lab", _NOW)
    issuing = make_issuing_ca(root, "lab", _NOW)
    both = certificates_to_pem([issuing.certificate, root.certificate])
    return [_der(certificates_to_pem([issuing.certificate])), both]


def check_key(data: bytes, folder: Path) -> None:
    for pem in (_pem("PRIVATE KEY", data).encode(), data):
        with only(ConfigError):
            key_from_pem(pem, "tls.key")


def _keys() -> list[bytes]:
    pem = key_to_pem(new_key())
    return [_der(pem), pem]


_TOKEN_WORDS = (
    *TEXT_WORDS,
    b'"operator":"o"',
    b'"site":""',
    b'"v":true',
    b'"port":8444.0',
    json.dumps("\u2028").encode(),
)
TARGETS = [
    Target("token", check_token, _tokens, _TOKEN_WORDS),
    Target("certificate_request", check_request, _requests, BINARY_WORDS),
    Target("certificates", check_certificates, _certificates, BINARY_WORDS),
    Target("private_key", check_key, _keys, BINARY_WORDS),
]
