"""`fedserver backup|restore|release|migrate` as they are typed, in this process."""

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedcore.database import copy_before_migration, open_database, schema_version
from fedcore.errors import ConfigError, ConflictError, FedimpresError, StorageError
from fedserver.cli import app
from fedserver.config import ServerHome
from fedserver.initialise import initialise
from fedserver.schema import MIGRATIONS


def run(*words: object) -> str:
    """A command's output. Raises what it raises."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(done.exception, FedimpresError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def home(tmp_path: Path) -> Path:
    now = datetime.now(UTC)
    return initialise(
        tmp_path / "home", name="lab", host="localhost", port=9443, enroll_port=9444, now=now
    ).home.root


def test_backup_restore_and_release_in_this_order(home: Path, tmp_path: Path) -> None:
    words, out, new = tmp_path / "words", tmp_path / "lab.fedbackup", tmp_path / "new"
    words.write_text("correct horse battery staple\n")
    words.chmod(0o600)
    secret = ("--passphrase-file", words)
    assert "0 artifacts, SHA-256" in run("backup", "create", "--home", home, "--out", out, *secret)
    with pytest.raises(ConflictError, match="already there"):
        run("backup", "create", "--home", home, "--out", out, *secret)
    restore = ("restore", "--home", new, "--from", out, *secret)
    with pytest.raises(ConfigError, match="either --revoked SERIAL,... or --no-revocations-since"):
        run(*restore, "--revoked", "operator/admin", "--no-revocations-since")
    assert not new.exists()
    said = run(*restore, "--term", 5)
    assert "term 1 is over; this one is of term 5" in said
    assert f"Next: fedserver release --home {new}" in said
    assert "serves nobody before" in run("check-config", "--home", new)
    with pytest.raises(ConfigError, match="either"):
        run("release", "--home", new)
    said = run("release", "--home", new, "--revoked", "operator/admin, deadbeef01")
    assert "Not in the registry, so refused in any case: deadbeef01" in said
    assert "serves nobody" not in run("check-config", "--home", new)
    with pytest.raises(ConflictError, match="is not held"):
        run("release", "--home", new, "--no-revocations-since")
    at_once = run("restore", "--home", tmp_path / "now", "--from", out, *secret, "--no-revocations-since")
    assert "The coordinator may serve" in at_once


def test_migrate_tries_does_and_refuses_what_is_newer(home: Path) -> None:
    path, newest = ServerHome(home).database, len(MIGRATIONS)
    path.unlink()
    open_database(path, MIGRATIONS[:-1], create=True).close()
    said = run("migrate", "--home", home, "--dry-run")
    assert f"can go from schema {newest - 1} to {newest}: tried on a copy" in said
    assert schema_version(path) == newest - 1
    assert f"went from schema {newest - 1} to {newest}" in run("migrate", "--home", home)
    assert schema_version(copy_before_migration(path, newest - 1)) == newest - 1
    assert "nothing to do" in run("migrate", "--home", home)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version={newest + 1}")
    with pytest.raises(StorageError, match="written by a newer version"):
        run("migrate", "--home", home)


def test_every_earlier_schema_goes_forward_to_this_one(tmp_path: Path) -> None:
    for version in range(1, len(MIGRATIONS)):
        path = tmp_path / f"{version}.db"
        open_database(path, MIGRATIONS[:version], create=True).close()
        open_database(path, MIGRATIONS).close()
        assert schema_version(path) == len(MIGRATIONS)
