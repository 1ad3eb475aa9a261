"""`fedserver restore` and `fedserver release`: a coordinator from a backup, in a new term, held until it may serve.

What was revoked since the backup is not in it. So the restored coordinator serves nobody until somebody says what was
revoked, or that nothing was. Enrolment tokens that were open are void: whoever holds one asks for a new one.
"""

import asyncio
import os
import sqlite3
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedcore.audit import Fact
from fedcore.audit_store import AuditLog
from fedcore.backup.archive import Member, unpack
from fedcore.backup.envelope import BackupHeader, BackupReader, read_header
from fedcore.backup.keys import KeySource
from fedcore.database import Database, open_database
from fedcore.errors import (
    ConfigError,
    ConflictError,
    NotFoundError,
    StorageError,
)
from fedcore.identity import Caller, is_name
from fedcore.private_files import make_folder, sync_folder
from fedcore.term import Term
from fedserver.authority import load_authority
from fedserver.certificates import Certificates, Owner
from fedserver.checks import check_home, load_home
from fedserver.config import ServerHome
from fedserver.registry import rfc3339
from fedserver.schema import MIGRATIONS
from fedserver.terms import Terms, begin_term, release

_MACHINE = "coordinator's machine"
_REASON = "revoked since the backup"


@dataclass(frozen=True, slots=True)
class Revoked:
    """What was revoked since the backup: serial numbers (or what they begin with), and site/ID or operator/ID for all
    certificates of one member. Empty: the operator says that nothing was.
    """

    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Restored:
    """What came out of a restore. `absent` artifacts were missing when the backup was made."""

    header: BackupHeader
    before: Term
    term: Term
    voided_tokens: int
    artifacts: int
    absent: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Released:
    """What `release_home` did: certificates ended, and names that the registry does not know (refused in any case)."""

    ended: tuple[str, ...]
    unknown: tuple[str, ...]


def restore(home: Path, backup: Path, keys: KeySource, now: datetime, *, at_least: int = 0) -> Restored:
    """Make the coordinator's home `home` (absent or empty) from a backup: a held coordinator of a new term.

    `at_least` is the least number of the new term. The home appears whole or not at all. Raises ConflictError if it is
    used, BackupError, StorageError for a backup of a newer version, ConfigError.
    """
    _refuse_used(home)
    _refuse_newer(read_header(backup), backup)
    home.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(
            prefix=f".{home.name}.restoring-", dir=home.parent, ignore_cleanup_errors=True
        ) as staged:
            places = ServerHome(Path(staged) / "home")
            make_folder(places.root)
            with BackupReader(backup, keys) as reader:
                manifest = unpack(reader, lambda member: _place(places.root, member))
                header = reader.header
            for folder in (places.artifacts, places.spool):
                make_folder(folder)
            before, term, voided = _begin(places, header, now, at_least)
            for _ in check_home(places.root, now):
                pass
            os.sync()  # all that was unpacked, before it gets its name
            places.root.replace(home)
            sync_folder(home.parent)
    except OSError as error:
        raise StorageError(f"{home}: can't be restored: {error}") from error
    return Restored(header, before, term, voided, manifest.artifacts, manifest.absent)


def _refuse_used(home: Path) -> None:
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise ConflictError(
            f"{home} is there and not empty; nothing was changed",
            hint="restore to a new folder; a home that still works needs no restore",
        )


def _refuse_newer(header: BackupHeader, backup: Path) -> None:
    if header.schema_version > len(MIGRATIONS):
        raise StorageError(
            f"{backup}: made by a newer version, fedimpres {header.software_version} (schema "
            f"{header.schema_version}, this one knows {len(MIGRATIONS)})",
            hint="install that version, or a newer one, and restore with it",
        )


def _place(root: Path, member: Member) -> Path:
    """Where a member goes; its name was checked to lie below the home."""
    path = root / member.name
    for folder in (path.parent, *path.parent.parents):
        if folder == root:
            break
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


def _begin(places: ServerHome, header: BackupHeader, now: datetime, at_least: int) -> tuple[Term, Term, int]:
    """Begin the new term in the restored database, and void what must not outlive the old coordinator."""
    database = open_database(places.database, MIGRATIONS)
    try:
        log = AuditLog(database)

        def write(connection: sqlite3.Connection) -> tuple[Term, Term, int]:
            before, term = begin_term(
                connection,
                now,
                backup=header.id,
                audit_sequence=log.head().sequence,
                at_least=at_least,
            )
            moment = rfc3339(now)
            voided = connection.execute(
                "UPDATE tokens SET expires_at = ? WHERE used_at IS NULL AND expires_at > ?", (moment, moment)
            ).rowcount
            log.append(
                connection,
                Fact(
                    "coordinator.restore",
                    _MACHINE,
                    object=f"backup/{header.id}",
                    detail={
                        "term": str(term),
                        "before": str(before),
                        "backup_made": header.created_at,
                        "voided_tokens": voided,
                    },
                ),
            )
            return before, term, voided

        return database.write_now(write)
    finally:
        database.close()


def release_home(home: Path, revoked: Revoked, now: datetime) -> Released:
    """Take in what was revoked since the backup, then let the coordinator serve; also beside one that runs, and waits.

    Raises ConfigError for what names neither a certificate nor a member, ConflictError for a number with which several
    certificates begin, and for a coordinator that is not held; nothing is changed then.
    """
    config, places = load_home(home), ServerHome(home)
    names = tuple(map(_checked, revoked.names))
    authority = load_authority(places.pki, config.name)
    database = open_database(places.database, MIGRATIONS)
    try:
        by = Caller(config.name, "operator", _MACHINE, "", datetime.max.replace(tzinfo=UTC))
        certificates = Certificates(database, lambda: authority)
        if not Terms(database).held():
            raise ConflictError(
                f"{home} is not held: it serves, or may", hint="revoke with: fedctl cert revoke SERIAL"
            )
        for name in names:  # before anything is changed
            _look_up(certificates, name)
        ended, unknown = asyncio.run(_revoke(certificates, names, by))
        _release(database, now, ended, unknown)
    finally:
        database.close()
    return Released(ended, unknown)


def _checked(name: str) -> str:
    role, separator, member = name.partition("/")
    if separator:
        if role not in ("site", "operator") or not is_name(member):
            raise ConfigError(f"{name!r:.80}: expected site/ID or operator/ID")
        return name
    if len(name) < 8 or set(name.lower()) - set("0123456789abcdef"):
        raise ConfigError(
            f"{name!r:.80} is not a serial number",
            hint="at least its first 8 digits, as 'fedctl cert list' shows them",
        )
    return name.lower()


def _look_up(certificates: Certificates, name: str) -> bool:
    """Whether the registry knows a certificate or a member. Raises ConflictError."""
    role, separator, member = name.partition("/")
    if separator:
        return bool(certificates.rows(owner=Owner(role, member)))
    try:
        certificates.one(name)
    except NotFoundError:
        return False
    return True


async def _revoke(
    certificates: Certificates, names: Sequence[str], by: Caller
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    ended: list[str] = []
    unknown = []
    for name in names:
        if not _look_up(certificates, name):
            unknown.append(name)
            continue
        role, separator, member = name.partition("/")
        if separator:
            rows, _ = await certificates.revoke_all(Owner(role, member), by=by, reason=_REASON)
        else:
            rows, _ = await certificates.revoke(name, by=by, reason=_REASON)
        ended += [row.serial for row in rows]
    return tuple(dict.fromkeys(ended)), tuple(unknown)


def _release(database: Database, now: datetime, ended: Sequence[str], unknown: Sequence[str]) -> None:
    def write(connection: sqlite3.Connection) -> None:
        release(connection, now)
        detail = {"revoked": ",".join(ended), "not_in_registry": ",".join(unknown)}
        AuditLog(database).append(
            connection, Fact("coordinator.release", _MACHINE, object="coordinator", detail=detail)
        )

    database.write_now(write)
