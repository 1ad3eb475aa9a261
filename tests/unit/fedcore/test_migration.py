"""A database brought forward: tried on a copy, kept as it was beside it, never back."""

from pathlib import Path

import pytest

from fedcore.database import Database, copy_before_migration, open_database, schema_version
from fedcore.errors import StorageError
from fedcore.migration import migrate_file

OLD = ["CREATE TABLE a (b TEXT) STRICT"]
NEW = [*OLD, "ALTER TABLE a ADD COLUMN c TEXT NOT NULL DEFAULT 'x'"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.db"
    database = open_database(path, OLD, create=True)
    database.write_now(lambda c: c.execute("INSERT INTO a VALUES ('kept')"))
    database.close()
    return path


def rows(path: Path, migrations: list[str]) -> list[tuple[str, ...]]:
    database = open_database(path, migrations)
    try:
        return [tuple(row) for row in database.read(lambda c: c.execute("SELECT * FROM a").fetchall())]
    finally:
        database.close()


def test_a_dry_run_changes_nothing(path: Path) -> None:
    said = migrate_file(path, NEW, dry_run=True)
    assert "can go from schema 1 to 2" in said
    assert schema_version(path) == 1
    assert {entry.name for entry in path.parent.iterdir()} <= {"a.db", "a.db-wal", "a.db-shm"}


def test_what_was_there_before_is_kept_beside_it(path: Path) -> None:
    said = migrate_file(path, NEW, dry_run=False)
    copy = copy_before_migration(path, 1)
    assert f"went from schema 1 to 2; the file before is {copy}" in said
    assert rows(path, NEW) == [("kept", "x")]
    assert rows(copy, OLD) == [("kept",)]
    assert "nothing to do" in migrate_file(path, NEW, dry_run=False)


def test_serving_keeps_a_copy_too(path: Path) -> None:
    open_database(path, NEW).close()
    assert schema_version(copy_before_migration(path, 1)) == 1


def test_a_new_file_needs_no_copy(tmp_path: Path) -> None:
    open_database(tmp_path / "new.db", NEW, create=True).close()
    assert not list(tmp_path.glob("*.schema-*"))


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_does_not_work_on_the_copy_is_not_done(path: Path, dry_run: bool) -> None:
    def check(database: Database) -> None:
        raise StorageError("journal record 3 can't be read")

    with pytest.raises(StorageError, match="record 3"):
        migrate_file(path, NEW, dry_run=dry_run, check=check)
    with pytest.raises(StorageError, match="no such table"):
        migrate_file(path, [*OLD, "ALTER TABLE nowhere ADD COLUMN c TEXT"], dry_run=dry_run)
    assert schema_version(path) == 1
    assert rows(path, OLD) == [("kept",)]


def test_a_file_of_a_newer_version_is_refused_and_left_as_it_is(path: Path) -> None:
    open_database(path, NEW).close()
    before = path.read_bytes()
    with pytest.raises(
        StorageError, match=r"written by a newer version \(schema 2, this one knows 1\)"
    ) as caught:
        migrate_file(path, OLD, dry_run=False)
    assert "install the newer version" in caught.value.hint
    assert path.read_bytes() == before
    with pytest.raises(StorageError, match="no such database"):
        migrate_file(path.with_name("none.db"), OLD, dry_run=True)
