"""Files of backups on disk: written whole or not at all, and checked completely without a coordinator."""

import errno
import hashlib
import os
import sqlite3
import tempfile
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from fedcore.backup.archive import CREDENTIAL, DATABASE, PKI, Manifest, Member, unpack
from fedcore.backup.envelope import BackupHeader, BackupReader
from fedcore.backup.keys import KeySource
from fedcore.errors import BackupError, ConflictError, StorageError
from fedcore.pki import certificates_from_pem
from fedcore.private_files import sync_folder

SUFFIX = ".fedbackup"


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was written: bytes, and SHA-256 in hex."""

    path: Path
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Checked:
    """What a backup was found to hold."""

    header: BackupHeader
    manifest: Manifest
    total_bytes: int


def write_backup(out: Path, pieces: Iterable[bytes]) -> Written:
    """Write a backup to `out`, mode 0600; it appears whole, or not at all.

    Raises ConflictError if `out` is there, StorageError if it can't be written, and what `pieces` raises.
    """
    if out.exists():
        raise ConflictError(
            f"{out} is already there", hint="give another --out; backups are never overwritten"
        )
    digest, size = hashlib.sha256(), 0
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{out.name}.", dir=out.parent)  # mode 0600
    except OSError as error:
        raise StorageError(f"{out}: can't be written: {error}") from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            for piece in pieces:
                digest.update(piece)
                size += len(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        _name(Path(temporary), out)
        sync_folder(out.parent)
    except FileExistsError as error:
        raise ConflictError(f"{out} is already there") from error
    except OSError as error:
        raise StorageError(f"{out}: can't be written: {error}") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return Written(out, size, digest.hexdigest())


def _name(temporary: Path, out: Path) -> None:
    """Give a finished file its name, never over another file. Raises FileExistsError, OSError."""
    try:
        out.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError as error:  # a file system without hard links, of a USB stick say
        if out.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out)) from error
        temporary.rename(out)


def check_backup(path: Path, keys: KeySource) -> Checked:
    """Read a backup to its end: every byte authentic, every member as in the manifest, the database whole, the
    certificates readable. Nothing of it stays on the disk.

    Raises BackupError that says what is not so, ConfigError if the file can't be read.
    """
    with tempfile.TemporaryDirectory(prefix="fedbackup-") as scratch, BackupReader(path, keys) as reader:
        places: dict[str, Path] = {}

        def place(member: Member) -> Path | None:
            if member.name != DATABASE and not member.name.endswith(".crt"):
                return None
            places[member.name] = Path(scratch) / str(len(places))
            return places[member.name]

        manifest = unpack(reader, place)
        _check_database(path, places[DATABASE], reader.header.schema_version)
        for name in (f"{PKI}/root.crt", f"{PKI}/issuing.crt", f"{CREDENTIAL}/tls.crt"):
            if name not in places:
                raise BackupError(f"{path} holds no {name}")
            certificates_from_pem(places[name].read_bytes(), f"{path}: {name}")
        return Checked(reader.header, manifest, sum(member.size for member in manifest.members))


def _check_database(path: Path, database: Path, version: int) -> None:
    try:
        with closing(sqlite3.connect(f"file:{database}?immutable=1", uri=True)) as connection:
            findings = [row[0] for row in connection.execute("PRAGMA integrity_check(3)")]
            (found,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error as error:
        raise BackupError(f"{path}: its database can't be read: {error}") from error
    if findings != ["ok"] or found != version:
        raise BackupError(
            f"{path}: its database is damaged: {'; '.join(map(str, findings))}, schema {found}, expected {version}"
        )
