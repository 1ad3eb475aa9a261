"""Takes one consistent state of a coordinator's home, beside the coordinator at work, and seals it.

The database is copied first (SQLite's online backup); the journal in that copy says which artifacts its runs need. These
are hard-linked, so that the coordinator may delete them meanwhile. If it deleted one in between, the copy is made again.
"""

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fedcore.artifact_store import ArtifactStore
from fedcore.audit import Fact
from fedcore.audit_store import AuditLog
from fedcore.backup import archive
from fedcore.backup.envelope import seal
from fedcore.backup.files import Written, write_backup
from fedcore.backup.keys import Recipient
from fedcore.credential import load_credential
from fedcore.database import copy_database, open_database
from fedcore.errors import FedimpresError, StorageError
from fedcore.home_lock import HomeLock
from fedcore.term import Term
from fedcore.version import software_version
from fedserver.authority import load_authority
from fedserver.checks import load_home
from fedserver.config import ServerHome
from fedserver.journal import Journal
from fedserver.registry import rfc3339
from fedserver.round_state import needed
from fedserver.schema import MIGRATIONS
from fedserver.terms import Terms

_ATTEMPTS = 5
_FOLDER = ".backup-"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One state of a home. Its files are there while `snapshot` is open; `absent` are artifacts that runs name and that
    are missing or damaged here.
    """

    id: str
    federation: str
    created_at: str
    term: Term
    sources: tuple[archive.Source, ...]
    absent: tuple[str, ...]

    @property
    def artifacts(self) -> int:
        """How many artifacts it holds."""
        return sum(one.member.name.startswith(f"{archive.ARTIFACTS}/") for one in self.sources)

    def sealed(self, recipient: Recipient) -> Iterator[bytes]:
        """The file of the backup, piece by piece. Raises BackupError, ConfigError."""
        return seal(
            archive.pack(self.sources, self.absent),
            recipient,
            backup_id=self.id,
            federation=self.federation,
            term=self.term.number,
            created_at=self.created_at,
            software_version=software_version(),
            schema_version=len(MIGRATIONS),
        )


@contextmanager
def snapshot(places: ServerHome, federation: str, store: ArtifactStore, now: datetime) -> Iterator[Snapshot]:
    """Take a state and hold it. Blocks while it copies and reads. Raises StorageError, OSError."""
    for left in places.root.glob(f"{_FOLDER}*"):  # by one that was killed; there is one at a time
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_FOLDER, dir=places.root, ignore_cleanup_errors=True) as folder:
        try:
            yield _taken(places, federation, store, now, Path(folder))
        except OSError as error:
            raise StorageError(f"{places.root}: can't be backed up: {error}") from error


def _taken(
    places: ServerHome, federation: str, store: ArtifactStore, now: datetime, folder: Path
) -> Snapshot:
    missing: set[str] | None = None
    for attempt in range(_ATTEMPTS):
        database = folder / f"{attempt}.db"
        copy_database(places.database, database)
        term, digests = _read(database)
        linked = {digest: _link(store, digest, folder) for digest in digests}
        before, missing = missing, {digest for digest, path in linked.items() if path is None}
        if not missing or missing == before:  # gone for good rather than deleted just now
            break
        database.unlink()
    sources = [archive.measure(archive.DATABASE, database)]
    keys = ServerHome(_copied_keys(places, federation, folder, now))
    sources += [archive.measure(path.relative_to(keys.root).as_posix(), path) for path in _files(keys.root)]
    absent = set(missing or ())
    for digest, path in sorted(linked.items()):
        if path is None:
            continue
        source = archive.measure(store.path(digest).relative_to(places.root).as_posix(), path)
        if source.member.sha256 == digest:
            sources.append(source)
        else:
            absent.add(digest)
    return Snapshot(
        secrets.token_hex(8), federation, rfc3339(now), term, tuple(sources), tuple(sorted(absent))
    )


def _read(path: Path) -> tuple[Term, set[str]]:
    """The term, and the artifacts that the runs of a copied database need."""
    database = open_database(path, MIGRATIONS)
    try:
        digests = {digest for _, state in Journal(database).replay() for digest in needed(state)}
        return Terms(database).current(), digests
    finally:
        database.close()


def _link(store: ArtifactStore, digest: str, folder: Path) -> Path | None:
    link = folder / digest
    if not link.exists():
        try:
            link.hardlink_to(store.path(digest))
        except FileNotFoundError:
            return None
    return link


def _copied_keys(places: ServerHome, federation: str, folder: Path, now: datetime) -> Path:
    """Copies of configuration, keys and certificates that belong together: they may be renewed at this moment."""
    for attempt in range(_ATTEMPTS):
        copy = ServerHome(folder / f"keys-{attempt}")
        try:
            copy.root.mkdir(mode=0o700)
            shutil.copy2(places.config, copy.config)
            hidden = shutil.ignore_patterns(".*")
            shutil.copytree(places.pki, copy.pki, ignore=hidden)
            shutil.copytree(places.credential, copy.credential, ignore=hidden)
            load_authority(copy.pki, federation)
            load_credential(copy.credential, now, allow_expired=True)
            break
        except (OSError, shutil.Error, FedimpresError):
            if attempt == _ATTEMPTS - 1:
                raise
    return copy.root


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def back_up_home(home: Path, out: Path, recipient: Recipient, now: datetime) -> tuple[Snapshot, Written]:
    """Back up a home whose coordinator does not run, to the file `out`.

    Raises ConflictError if it runs (`fedctl backup create` is for that) or `out` is there, ConfigError, StorageError.
    """
    config, places = load_home(home), ServerHome(home)
    with HomeLock(places.lock):
        store = ArtifactStore(places.artifacts)
        with snapshot(places, config.name, store, now) as taken:
            database = open_database(places.database, MIGRATIONS)
            try:
                AuditLog(database).record_now(
                    Fact(
                        "backup.create",
                        "coordinator's machine",
                        object=f"backup/{taken.id}",
                        detail={"artifacts": taken.artifacts, "absent": len(taken.absent)},
                    )
                )
            finally:
                database.close()
            return taken, write_backup(out, taken.sealed(recipient))
