"""Takes secrets out of what leaves the coordinator for a debug bundle.

Nothing in a bundle is meant to hold one; this is the second line. It looks for every private key that lies in the home,
in the forms that files and logs use, and for whatever has the form of a private key or of an enrolment token.
"""

import base64
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedcore.enrollment_token import TOKEN_BEGINNING

REMOVED = b"[removed: a secret]"
_PEM = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_TOKEN = re.compile(rb"%s[A-Za-z0-9_=-]*" % TOKEN_BEGINNING.encode())
# How every P-256 key in PKCS #8 begins in base64, and the rest of its 184 characters, over lines, JSON's escaped ones too:
# a site's key, which is not in this home, pasted without its first line.
_BARE = re.compile(rb"MIGHAgEAMBMGByqGSM49(?:[A-Za-z0-9+/=\s]|\\n){0,180}")
# A shorter piece of a key is no secret, and may well be something else.
_MIN_PIECE = 24


class Redactor:
    """Knows the private keys of a home. Build with `of_home`."""

    def __init__(self, secrets: Iterable[bytes]) -> None:
        self._secrets = sorted(set(secrets), key=len, reverse=True)

    @classmethod
    def of_home(cls, home: Path) -> "Redactor":
        """Read every key below the folder; one that can't be read is not ours to give away either."""
        secrets: list[bytes] = []
        for path in home.rglob("*.key"):
            try:
                secrets += forms_of_key(path.read_bytes())
            except OSError:
                continue
        return cls(secrets)

    def clean(self, data: bytes) -> bytes:
        """The data without secrets; what stood there says so."""
        data = _TOKEN.sub(REMOVED, _BARE.sub(REMOVED, _PEM.sub(REMOVED, data)))
        for secret in self._secrets:
            data = data.replace(secret, REMOVED)
        return data


def forms_of_key(pem: bytes) -> Iterator[bytes]:
    """A private key in the forms in which files, logs and JSON would hold it: body lines, whole body, DER, hex, base64."""
    lines = [line.strip() for line in pem.splitlines() if line.strip() and not line.startswith(b"-----")]
    yield from (line for line in lines if len(line) >= _MIN_PIECE)
    yield b"".join(lines)
    yield from _encoded(pem)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        return  # encrypted, or no key: its text is all there is to look for
    for form in (serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL):
        yield from _encoded(key.private_bytes(serialization.Encoding.DER, form, serialization.NoEncryption()))
    if isinstance(key, ec.EllipticCurvePrivateKey):
        number = key.private_numbers().private_value
        yield str(number).encode()
        yield from _encoded(number.to_bytes((key.key_size + 7) // 8, "big"))


def _encoded(data: bytes) -> Iterator[bytes]:
    yield data
    yield data.hex().encode()
    yield data.hex().upper().encode()
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        yield encode(data)
        yield encode(data).rstrip(b"=")
