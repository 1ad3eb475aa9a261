"""A database brought forward to this version on purpose, or tried first on a copy; `open_database` does it by itself too."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from fedcore.database import Database, copy_before_migration, copy_database, open_database, schema_version
from fedcore.errors import StorageError


def migrate_file(
    path: Path,
    migrations: Sequence[str],
    *,
    dry_run: bool,
    check: Callable[[Database], object] = lambda database: None,
) -> str:
    """Bring a database to the newest of `migrations`, after the same on a copy, where `check` must not raise.

    With `dry_run` the copy is all. Gives a sentence for people. Nothing is changed if it raises: StorageError for a file
    that is missing, damaged or of a newer version, and what `check` raises.
    """
    if not path.is_file():
        raise StorageError(f"{path}: no such database", hint="is --home the right folder?")
    version, newest = schema_version(path), len(migrations)
    with tempfile.TemporaryDirectory(prefix=".migrate-", dir=path.parent) as folder:
        copy = Path(folder) / path.name
        copy_database(path, copy)
        _open_and_check(copy, migrations, check)
    if version == newest:
        return f"{path} is of this version (schema {newest}); nothing to do"
    if dry_run:
        return f"{path} can go from schema {version} to {newest}: tried on a copy, nothing was changed"
    _open_and_check(path, migrations, check)
    return f"{path} went from schema {version} to {newest}; the file before is {copy_before_migration(path, version)}"


def _open_and_check(path: Path, migrations: Sequence[str], check: Callable[[Database], object]) -> None:
    database = open_database(path, migrations)
    try:
        check(database)
    finally:
        database.close()
