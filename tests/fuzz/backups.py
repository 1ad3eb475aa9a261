"""The file of a backup: its header, and its content behind the encryption."""

from collections.abc import Iterable
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedcore.backup.archive import Member, measure, pack, unpack
from fedcore.backup.envelope import BackupReader, read_header, seal
from fedcore.backup.keys import KeySource, Recipient, public_bytes
from fedcore.errors import BackupError, ConfigError
from tests.fuzz.target import BINARY_WORDS, TEXT_WORDS, Target, bounded, only

_KEY = X25519PrivateKey.from_private_bytes(bytes(range(32)))
_KEYS = KeySource(lambda terms: _KEY, "the key")


def _sealed(content: Iterable[bytes]) -> bytes:
    return b"".join(
        seal(
            content, Recipient(public_bytes(_KEY)), backup_id="0" * 16, federation="lab", term=1,
            created_at="2026-01-01T00:00:00Z", software_version="0.1.0", schema_version=1,
        )
    )  # fmt: skip


def _content() -> bytes:
    return b"".join(pack([measure(name, Path(__file__)) for name in ("fedserver.db", "fedserver.toml")], []))


def _unpack(path: Path, folder: Path) -> None:
    def place(member: Member) -> Path:
        return folder / member.name.replace("/", "~")

    with only(BackupError, ConfigError), bounded((16 << 20) + 100 * path.stat().st_size):
        read_header(path)
        with BackupReader(path, _KEYS) as reader:
            unpack(reader, place)


def check_file(data: bytes, folder: Path) -> None:
    path = folder / "backup"
    path.write_bytes(data)
    _unpack(path, folder)


def check_content(data: bytes, folder: Path) -> None:
    """The content as mutated, sealed as it should be: whoever has the public key can write such a file."""
    check_file(_sealed([data]), folder)


TARGETS = [
    Target("backup", check_file, lambda: [_sealed([_content()])], (*TEXT_WORDS, *BINARY_WORDS)),
    Target("backup_content", check_content, lambda: [_content()], (*TEXT_WORDS, *BINARY_WORDS)),
]
