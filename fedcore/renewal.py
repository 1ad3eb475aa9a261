"""When a certificate is renewed, and what its owner signs to renew one that has ended. Pure.

Renewing when a third of the life is left (as Let's Encrypt's integration guide advises) leaves time to find out that
renewal fails.
"""

import hashlib
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedcore.errors import IdentityError
from fedcore.pki import BACKDATING

# How long after its end a site's certificate still proves who asks for the next one.
GRACE = timedelta(days=30)
_FRACTION = 2 / 3
# Renewals of certificates that were issued together spread over this part of a life, before two thirds of it.
_JITTER = 0.1
_RETRIES = 20
_MIN_RETRY_S, _MAX_RETRY_S = 1.0, 3600.0
_CONTEXT = b"fedimpres renewal of an ended certificate, version 1\0"


def life_of(certificate: x509.Certificate) -> timedelta:
    """How long a certificate lives from the moment it was issued (notBefore lies `BACKDATING` before that)."""
    whole = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    return max(whole - BACKDATING, timedelta(seconds=1))


def renew_at(certificate: x509.Certificate) -> datetime:
    """When to renew: after two thirds of the life, or up to a tenth of it earlier.

    The jitter comes from the random serial number, so it is the same after a restart.
    """
    share = (certificate.serial_number % 10_007) / 10_007
    left = (1 - _FRACTION) + _JITTER * share
    return certificate.not_valid_after_utc - left * life_of(certificate)


def retry_s(certificate: x509.Certificate) -> float:
    """Seconds to wait after a renewal that failed: a twentieth of the life, from one second to an hour."""
    return min(max(life_of(certificate).total_seconds() / _RETRIES, _MIN_RETRY_S), _MAX_RETRY_S)


def ended_statement(federation: str, serial: str, csr_pem: str) -> bytes:
    """What the owner of an ended certificate signs: federation, serial number and request, as one digest.

    It holds no time: the answer is of use only to the holder of the request's key, however often it is asked for.
    """
    request = hashlib.sha256(csr_pem.encode()).digest()
    return _CONTEXT + federation.encode() + b"\0" + serial.encode() + b"\0" + request


def sign_statement(key: ec.EllipticCurvePrivateKey, statement: bytes) -> bytes:
    """ECDSA with SHA-256, DER."""
    return key.sign(statement, ec.ECDSA(hashes.SHA256()))


def check_statement(certificate: x509.Certificate, statement: bytes, signature: bytes) -> None:
    """Raise IdentityError unless the certificate's key signed the statement."""
    key = certificate.public_key()
    try:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise InvalidSignature
        key.verify(signature, statement, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature as error:
        raise IdentityError(
            "the request to renew is not signed by the key of the ended certificate"
        ) from error
