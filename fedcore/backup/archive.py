"""What is inside a backup: the manifest, then its members' bytes, one after the other in its order.

    length of the manifest   4 bytes, big-endian
    manifest                 JSON (Manifest): each member's name, size and SHA-256
    members                  their bytes

The names are paths below the coordinator's home. Nothing else is accepted as a name, so a backup can write nowhere else.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError, field_validator

from fedcore.backup.envelope import BackupReader
from fedcore.config import ConfigSection
from fedcore.errors import BackupError
from fedcore.plan import describe_problems

DATABASE, CONFIG, PKI, CREDENTIAL, ARTIFACTS = (
    "fedserver.db",
    "fedserver.toml",
    "pki",
    "credential",
    "artifacts",
)
_PART = "[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
_NAME = re.compile(
    rf"{re.escape(DATABASE)}|{re.escape(CONFIG)}|({PKI}|{CREDENTIAL})(/{_PART}){{1,2}}"
    rf"|{ARTIFACTS}/[0-9a-f]{{2}}/[0-9a-f]{{64}}\.safetensors"
)
_MAX_MANIFEST_BYTES = 256 << 20
READ_BYTES = 1 << 20
_SHA256 = "^[0-9a-f]{64}$"


class Member(ConfigSection):
    """A file of the coordinator's home: its path there, bytes, SHA-256 in hex."""

    name: str
    size: int = Field(ge=0)
    sha256: str = Field(pattern=_SHA256)

    @field_validator("name")
    @classmethod
    def _is_of_a_home(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError(f"{value[:120]!r} is no path of a coordinator's home")
        return value


class Manifest(ConfigSection):
    """All members in the order of their bytes, and the digests of artifacts that runs name and that were not there."""

    members: tuple[Member, ...]
    absent: tuple[str, ...] = ()

    @field_validator("members")
    @classmethod
    def _is_whole(cls, value: tuple[Member, ...]) -> tuple[Member, ...]:
        names = [member.name for member in value]
        if len(set(names)) < len(names) or not {DATABASE, CONFIG} <= set(names):
            raise ValueError("a name stands twice, or database or configuration are missing")
        return value

    @property
    def artifacts(self) -> int:
        """How many members are artifacts."""
        return sum(member.name.startswith(f"{ARTIFACTS}/") for member in self.members)


@dataclass(frozen=True, slots=True)
class Source:
    """A member, and the file that its bytes come from."""

    member: Member
    path: Path


def measure(name: str, path: Path) -> Source:
    """Size and SHA-256 of a file, as a member. Raises OSError."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
            size += len(data)
    return Source(Member(name=name, size=size, sha256=digest.hexdigest()), path)


def pack(sources: Iterable[Source], absent: Iterable[str]) -> Iterator[bytes]:
    """The content of a backup, piece by piece. Raises BackupError if a file changed since it was measured."""
    sources = tuple(sources)
    manifest = Manifest(members=tuple(source.member for source in sources), absent=tuple(absent))
    text = manifest.model_dump_json().encode()
    yield len(text).to_bytes(4, "big") + text
    for source in sources:
        digest, size = hashlib.sha256(), 0
        with source.path.open("rb") as file:
            while data := file.read(READ_BYTES):
                digest.update(data)
                size += len(data)
                yield data
        if (size, digest.hexdigest()) != (source.member.size, source.member.sha256):
            raise BackupError(
                f"{source.path} changed while it was backed up", hint="try again; check the disk"
            )


def unpack(reader: BackupReader, place: Callable[[Member], Path | None]) -> Manifest:
    """Read a backup to its end, checking every byte; members go where `place` says, those without a place nowhere.

    Files are made with mode 0600. Raises BackupError for what is not as it was written; files may have been made then.
    """
    manifest = _manifest(reader)
    for member in manifest.members:
        path = place(member)
        digest = hashlib.sha256()
        if path is None:
            for data in _pieces(reader, member):
                digest.update(data)
        else:
            path.touch(mode=0o600, exist_ok=False)
            with path.open("wb") as file:
                for data in _pieces(reader, member):
                    digest.update(data)
                    file.write(data)
        if digest.hexdigest() != member.sha256:
            raise BackupError(
                f"{reader.path}: {member.name} is not what the manifest says", hint="take another copy"
            )
    reader.end()
    return manifest


def _manifest(reader: BackupReader) -> Manifest:
    size = int.from_bytes(reader.read(4), "big")
    if size > _MAX_MANIFEST_BYTES:
        raise BackupError(f"{reader.path}: manifest of {size} bytes, expected at most {_MAX_MANIFEST_BYTES}")
    try:
        return Manifest.model_validate_json(reader.read(size))
    except ValidationError as error:
        raise BackupError(f"{reader.path}: {describe_problems(error)}") from error


def _pieces(reader: BackupReader, member: Member) -> Iterator[bytes]:
    left = member.size
    while left:
        yield (data := reader.read(min(left, READ_BYTES)))
        left -= len(data)
