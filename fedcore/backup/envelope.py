"""The encrypted file of a backup.

    FEDIMPRES-BACKUP\\n   17 bytes
    length of the header  4 bytes, big-endian
    header                JSON (BackupHeader): readable without the key, and bound to what follows
    chunks                AES-256-GCM, 1 MiB of content and 16 bytes each; only the last may be shorter

The key of the chunks follows from an ephemeral X25519 key and the recipient's, by HKDF-SHA256 over everything before the
chunks. A chunk's nonce is its number and whether it is the last, so that none can be moved, left out or added. This is the
construction of age (https://age-encryption.org/v1), with AES-GCM. Nothing is unpickled.

Source of the chunks: Hoang et al., "Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance", 2015 (STREAM).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import Field, ValidationError

from fedcore.backup.keys import KeySource, Recipient, ScryptTerms, public_bytes, public_key
from fedcore.config import ConfigSection
from fedcore.errors import BackupError, ConfigError
from fedcore.plan import Name, describe_problems

MAGIC = b"FEDIMPRES-BACKUP\n"
CHUNK_BYTES = 1 << 20
_TAG_BYTES = 16
_MAX_HEADER_BYTES = 64 << 10
_KEY_HEX = "^[0-9a-f]{64}$"
_NOT_ONE = "is it a file that 'fedctl backup create' made?"


class BackupHeader(ConfigSection):
    """What a backup says of itself without its key. Until it is opened with the key, anybody may have written it."""

    format: Literal[1] = 1
    id: str = Field(pattern="^[0-9a-f]{16}$")
    federation: Name
    term: int = Field(ge=1)
    # RFC 3339, UTC.
    created_at: str = Field(max_length=40)
    software_version: str = Field(max_length=40)
    # Of the coordinator's database.
    schema_version: int = Field(ge=1)
    recipient: str = Field(pattern=_KEY_HEX)
    ephemeral: str = Field(pattern=_KEY_HEX)
    scrypt: ScryptTerms | None = None


def seal(
    content: Iterable[bytes],
    recipient: Recipient,
    *,
    backup_id: str,
    federation: str,
    term: int,
    created_at: str,
    software_version: str,
    schema_version: int,
) -> Iterator[bytes]:
    """The file of a backup, piece by piece, none longer than a chunk. Raises ConfigError for a malformed recipient."""
    ephemeral = X25519PrivateKey.generate()
    shared = ephemeral.exchange(public_key(recipient.public))
    header = BackupHeader(
        id=backup_id,
        federation=federation,
        term=term,
        created_at=created_at,
        software_version=software_version,
        schema_version=schema_version,
        recipient=recipient.public.hex(),
        ephemeral=public_bytes(ephemeral).hex(),
        scrypt=recipient.scrypt,
    )
    text = header.model_dump_json(exclude_none=True).encode()
    before = MAGIC + len(text).to_bytes(4, "big") + text
    yield before
    cipher = AESGCM(_content_key(shared, before))
    number, waiting = 0, bytearray()
    for piece in content:
        waiting += piece
        while len(waiting) > CHUNK_BYTES:  # one chunk is held back: the last is marked
            yield cipher.encrypt(_nonce(number, last=False), bytes(waiting[:CHUNK_BYTES]), None)
            del waiting[:CHUNK_BYTES]
            number += 1
    yield cipher.encrypt(_nonce(number, last=True), bytes(waiting), None)


def read_header(path: Path) -> BackupHeader:
    """What a file says of itself; nothing is proved by it. Raises BackupError, ConfigError if it can't be read."""
    with _open(path) as file:
        return _header(file, path)[0]


class BackupReader:
    """The content of a backup, decrypted and authenticated as it is read. Use as a context manager."""

    def __init__(self, path: Path, keys: KeySource) -> None:
        """Open a file. Raises BackupError if it is no backup or not for this key, ConfigError if it can't be read."""
        self.path = path
        self._file = _open(path)
        try:
            self.header, before = _header(self._file, path)
            private = keys.private(self.header.scrypt)
            if public_bytes(private).hex() != self.header.recipient:
                raise BackupError(
                    f"{path} can't be opened with {keys.what}: it was made for another",
                    hint="try the passphrase or key of the day on which it was made",
                )
            shared = private.exchange(public_key(bytes.fromhex(self.header.ephemeral)))
        except ValueError as error:  # an ephemeral key that is no point of any use
            self._file.close()
            raise self._broken() from error
        except BaseException:
            self._file.close()
            raise
        self._cipher = AESGCM(_content_key(shared, before))
        self._number, self._last = 0, False
        self._ready = bytearray()
        self._next = self._file.read(CHUNK_BYTES + _TAG_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes. Raises BackupError if they are damaged or not there."""
        while len(self._ready) < count:
            if self._last:
                raise self._broken()
            self._decrypt()
        found = bytes(self._ready[:count])
        del self._ready[:count]
        return found

    def end(self) -> None:
        """Check that all content was read and the file was not cut at the end of a chunk. Raises BackupError."""
        if not self._last and not self._ready:
            self._decrypt()
        if self._ready or not self._last:
            raise self._broken()

    def _decrypt(self) -> None:
        chunk, self._next = self._next, self._file.read(CHUNK_BYTES + _TAG_BYTES)
        self._last = not self._next
        try:
            self._ready += self._cipher.decrypt(_nonce(self._number, last=self._last), chunk, None)
        except (InvalidTag, ValueError) as error:
            raise self._broken() from error
        self._number += 1

    def _broken(self) -> BackupError:
        return BackupError(
            f"{self.path} is damaged or cut off: chunk {getattr(self, '_number', 0)} is not what was written",
            hint="take another copy, or an older backup",
        )


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error


def _header(file: BinaryIO, path: Path) -> tuple[BackupHeader, bytes]:
    """The header, and all bytes up to its end."""
    start = file.read(len(MAGIC) + 4)
    size = int.from_bytes(start[len(MAGIC) :], "big")
    if not start.startswith(MAGIC) or not 0 < size <= _MAX_HEADER_BYTES:
        raise BackupError(f"{path} is not a backup of fedimpres", hint=_NOT_ONE)
    text = file.read(size)
    try:
        return BackupHeader.model_validate_json(text), start + text
    except ValidationError as error:
        raise BackupError(
            f"{path}: its header can't be read: {describe_problems(error)}",
            hint="it is damaged, or was made by a newer version of fedimpres",
        ) from error


def _content_key(shared: bytes, before: bytes) -> bytes:
    digest = SHA256()
    return HKDF(algorithm=digest, length=32, salt=None, info=b"fedimpres backup\0" + before).derive(shared)


def _nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])
