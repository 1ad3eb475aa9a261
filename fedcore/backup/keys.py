"""Who can open a backup: the holder of an X25519 private key, which lies in a file or follows from a passphrase.

Whoever makes a backup needs the public key only, so a nightly job holds nothing that opens what it makes.
"""

import base64
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt
from pydantic import Field

from fedcore.config import ConfigSection
from fedcore.errors import BackupError, ConfigError
from fedcore.private_files import check_private

_PUBLIC, _PRIVATE = "fedimpres-backup-recipient:", "fedimpres-backup-key:"
KEY_BYTES = 32
_MIN_PASSPHRASE = 12
# 128 * n * r bytes of memory: 64 MiB, half a second.
_N, _R, _P = 2**16, 8, 1


class ScryptTerms(ConfigSection):
    """How a passphrase gives the private key (RFC 7914). `salt` is hex. Bounded: a file must not choose our memory."""

    salt: str = Field(pattern="^[0-9a-f]{32,128}$")
    n: int = Field(ge=2**10, le=2**18)
    r: int = Field(ge=1, le=8)
    p: int = Field(ge=1, le=4)


@dataclass(frozen=True, slots=True)
class Recipient:
    """Whom a backup is for: a public key, and how a passphrase gives the private one if it does."""

    public: bytes
    scrypt: ScryptTerms | None = None


@dataclass(frozen=True, slots=True)
class KeySource:
    """What a person gives to open backups. `private` takes the header's recipient and scrypt terms."""

    private: Callable[[ScryptTerms | None], X25519PrivateKey]
    what: str


def recipient_of_passphrase(passphrase: str) -> Recipient:
    """A new recipient, whose private key follows from a passphrase. Raises ConfigError for a short one."""
    if len(passphrase) < _MIN_PASSPHRASE:
        raise ConfigError(
            f"the passphrase has {len(passphrase)} characters, expected at least {_MIN_PASSPHRASE}",
            hint="a backup holds the federation's signing key: take a long one, or a key file (fedctl backup key)",
        )
    terms = ScryptTerms(salt=secrets.token_hex(16), n=_N, r=_R, p=_P)
    return Recipient(public_bytes(_derived(passphrase, terms)), terms)


def recipient_from_text(text: str) -> Recipient:
    """A recipient as `fedctl backup key` prints it. Raises ConfigError."""
    return Recipient(_decode(text, _PUBLIC, "recipient"))


def make_key_file(path: Path) -> str:
    """Write a new private key to `path` (mode 0600); gives the recipient's text. Raises ConfigError if it is there."""
    key = X25519PrivateKey.generate()
    text = _PRIVATE + base64.urlsafe_b64encode(key.private_bytes_raw()).decode() + "\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigError(f"{path}: can't be made: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return _PUBLIC + base64.urlsafe_b64encode(public_bytes(key)).decode()


def from_passphrase(passphrase: str) -> KeySource:
    """Open what was made with a passphrase."""

    def private(terms: ScryptTerms | None) -> X25519PrivateKey:
        if terms is None:
            raise BackupError(
                "the backup was made for a key file, not with a passphrase", hint="give --key FILE"
            )
        return _derived(passphrase, terms)

    return KeySource(private, "this passphrase")


def from_key_file(path: Path) -> KeySource:
    """Open what was made for the key in a file. Raises ConfigError if it can't be read, or by others too."""
    check_private(path)
    raw = _decode(path.read_text(errors="replace"), _PRIVATE, str(path))

    def private(terms: ScryptTerms | None) -> X25519PrivateKey:
        if terms is not None:
            raise BackupError(
                "the backup was made with a passphrase, not for a key file",
                hint="give --passphrase-file FILE",
            )
        return X25519PrivateKey.from_private_bytes(raw)

    return KeySource(private, f"the key in {path}")


def read_passphrase(path: Path) -> str:
    """The first line of a file that only its owner may read. Raises ConfigError."""
    check_private(path)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[0] if lines else ""


def public_bytes(key: X25519PrivateKey) -> bytes:
    """The public key that belongs to a private one."""
    return key.public_key().public_bytes_raw()


def public_key(raw: bytes) -> X25519PublicKey:
    """A public key from its bytes. Raises ConfigError."""
    if len(raw) != KEY_BYTES:
        raise ConfigError(f"a backup's recipient has {len(raw)} bytes, expected {KEY_BYTES}")
    return X25519PublicKey.from_public_bytes(raw)


def _derived(passphrase: str, terms: ScryptTerms) -> X25519PrivateKey:
    function = Scrypt(salt=bytes.fromhex(terms.salt), length=KEY_BYTES, n=terms.n, r=terms.r, p=terms.p)
    return X25519PrivateKey.from_private_bytes(function.derive(passphrase.encode("utf-8", "surrogatepass")))


def _decode(text: str, prefix: str, what: str) -> bytes:
    body = text.strip().removeprefix(prefix)
    try:
        raw = base64.b64decode(body, altchars=b"-_", validate=True)
    except ValueError:
        raw = b""
    if not text.strip().startswith(prefix) or len(raw) != KEY_BYTES:
        raise ConfigError(
            f"{what}: expected {prefix} and {KEY_BYTES} bytes in base64",
            hint="make a pair: fedctl backup key --out FILE",
        )
    return raw
