"""One SQLite file, one writer thread, group commit.

Writes queue up; the writer performs all that wait as one transaction and commits once (`synchronous=FULL`: an
fsync), so a hundred concurrent writers pay for one. Each write has its own savepoint: one that fails undoes
nothing of the others. Results are given only after the commit. Reads see everything that was committed, and
never wait for writers (WAL).
"""

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from fedcore.errors import ConflictError, StorageError

T = TypeVar("T")
Write = Callable[[sqlite3.Connection], Any]

_MAX_GROUP = 256
_BUSY_TIMEOUT_S = 10.0


class Database:
    """An open database. Made by `open_database`; `close` it."""

    def __init__(self, path: Path, writer: sqlite3.Connection, reader: sqlite3.Connection) -> None:
        self.path = path
        self._writer = writer
        self._reader = reader
        self._reading = threading.Lock()
        self._queue: queue.SimpleQueue[tuple[Write, Future[Any]] | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._died: StorageError | None = None
        self._thread = threading.Thread(target=self._run, name=f"writer {path.name}", daemon=True)

    @property
    def waiting(self) -> int:
        """How many writes wait for the writer."""
        return self._queue.qsize()

    async def write(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        """Run `fn` in the writer thread and give its result once it is durable.

        `fn` must be quick and neither commit nor roll back. What it raises is raised here, and its changes
        are undone; errors of SQLite become StorageError. Writes happen in the order of the calls. If the
        caller is cancelled, the write may or may not happen.
        """
        return await asyncio.wrap_future(self._submit(fn))

    def write_now(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        """The same for callers without an event loop: blocks until it is durable."""
        return self._submit(fn).result()

    def read(self, fn: Callable[[sqlite3.Connection], T]) -> T:
        """Run a quick query on the reading connection, in the calling thread; any thread may.

        Raises StorageError if the file fails, or if `fn` tries to write.
        """
        with self._reading:
            if self._closed:
                raise StorageError(f"{self.path}: database is closed")
            try:
                return fn(self._reader)
            except sqlite3.Error as error:
                raise storage_error(self.path, error) from error

    def close(self) -> None:
        """Perform what is queued, then close the file. May be called twice."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._thread.join()
        self._writer.close()
        with self._reading:
            self._reader.close()

    def start(self) -> None:
        """Start the writer thread."""
        self._thread.start()

    def _submit(self, fn: Callable[[sqlite3.Connection], T]) -> "Future[T]":
        future: Future[T] = Future()
        with self._closing:
            if self._closed:
                raise StorageError(f"{self.path}: database is closed")
            if self._died is not None:
                raise StorageError(self._died.message, hint=self._died.hint)
            self._queue.put((fn, future))
        return future

    def _run(self) -> None:
        group: list[tuple[Write, Future[Any]] | None] = []
        try:
            while None not in group:
                group = [self._queue.get()]
                while len(group) < _MAX_GROUP and not self._queue.empty():
                    group.append(self._queue.get())
                self._perform(
                    [one for one in group if one is not None and one[1].set_running_or_notify_cancel()]
                )
        except BaseException as error:  # a bug of ours: nobody waits for ever for a thread that is gone
            self._die(group, error)
            raise

    def _die(self, group: list[tuple[Write, "Future[Any]"] | None], error: BaseException) -> None:
        """Refuse every write that waits, and all that come later."""
        with self._closing:
            died = self._died = StorageError(
                f"{self.path}: the writer has failed: {type(error).__name__}: {error}",
                hint="restart the program; what it had confirmed is stored",
            )
            while not self._queue.empty():
                group.append(self._queue.get())
        for one in group:
            if one is not None and not one[1].done():
                one[1].set_exception(died)

    def _perform(self, group: list[tuple[Write, "Future[Any]"]]) -> None:
        """One transaction for the whole group; futures resolve after the commit, or with the error."""
        if not group:
            return
        results: list[tuple[Future[Any], Any]] = []
        failures: list[tuple[Future[Any], BaseException]] = []
        try:
            self._writer.execute("BEGIN IMMEDIATE")
            for fn, future in group:
                self._writer.execute("SAVEPOINT one_write")
                try:
                    results.append((future, fn(self._writer)))
                except Exception as error:
                    if not self._writer.in_transaction:  # disk full, I/O error: SQLite undid everything
                        raise
                    self._writer.execute("ROLLBACK TO one_write")  # if it fails, so does the group
                    failures.append((future, self._translated(error)))
                self._writer.execute("RELEASE one_write")
            self._writer.execute("COMMIT")
        except BaseException as error:
            # Where it fails too, the next group's BEGIN fails, and it is tried again.
            with contextlib.suppress(sqlite3.Error):
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
            failures, results = [(future, self._lost(error)) for _, future in group], []
        for future, failure in failures:
            future.set_exception(failure)
        for future, result in results:
            future.set_result(result)

    def _translated(self, error: Exception) -> Exception:
        return storage_error(self.path, error) if isinstance(error, sqlite3.Error) else error

    def _lost(self, error: BaseException) -> StorageError:
        """Why none of a group's writes was stored."""
        if isinstance(error, sqlite3.Error):
            return storage_error(self.path, error)
        return StorageError(f"{self.path}: not stored: {type(error).__name__}: {error}")


def open_database(path: Path, migrations: Sequence[str], *, create: bool = False) -> Database:
    """Open a database file and bring it to the newest of `migrations` (SQL scripts, numbered from 1 by
    position). Before it is changed, a copy is made beside it (`copy_before_migration`).

    Raises ConflictError if `create` is set and the file is there, StorageError if it is not there, damaged,
    locked, or written by a newer version.
    """
    if create and path.exists():
        raise ConflictError(f"{path} is already there")
    if not create and not path.is_file():
        raise StorageError(
            f"{path}: no such database", hint="restore it from a backup, or initialise a new home"
        )
    if create:
        path.touch(mode=0o600)
    connections: list[sqlite3.Connection] = []
    try:
        connections.append(_connect(path))
        _check(path, connections[0])
        _migrate(path, connections[0], migrations)
        connections.append(_connect(path))
        connections[1].execute("PRAGMA query_only=ON")
    except BaseException as error:
        for connection in connections:
            connection.close()
        if isinstance(error, sqlite3.Error):
            raise storage_error(path, error) from error
        raise
    database = Database(path, connections[0], connections[1])
    database.start()
    return database


def storage_error(path: Path, error: sqlite3.Error) -> StorageError:
    """What SQLite says, and what to do about it."""
    name = getattr(error, "sqlite_errorname", "") or ""
    hints = {
        "SQLITE_FULL": "free space on this file system",
        "SQLITE_IOERR": "check the disk and its file system",
        "SQLITE_BUSY": "another process holds the file; is a second coordinator running?",
        "SQLITE_LOCKED": "another process holds the file; is a second coordinator running?",
        "SQLITE_CORRUPT": "stop the program, keep a copy of the file, and restore the newest backup",
        "SQLITE_NOTADB": "stop the program, keep a copy of the file, and restore the newest backup",
        "SQLITE_READONLY": "check that the file, its folder and its owner are those of the service",
        "SQLITE_CANTOPEN": "check that the file, its folder and its owner are those of the service",
    }
    hint = next((text for prefix, text in hints.items() if name.startswith(prefix)), "")
    return StorageError(f"{path}: {error}" + (f" [{name}]" if name else ""), hint=hint)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
    except BaseException:
        connection.close()
        raise
    return connection


def _check(path: Path, connection: sqlite3.Connection) -> None:
    findings = [row[0] for row in connection.execute("PRAGMA quick_check(3)")]
    if findings != ["ok"]:
        raise StorageError(
            f"{path}: database is damaged: {'; '.join(map(str, findings))}",
            hint="stop the program, keep a copy of the file, and restore the newest backup",
        )


def copy_database(path: Path, target: Path) -> None:
    """Copy a database file as of one moment, mode 0600, while others read and write it. Raises StorageError, also if
    `target` is there.
    """
    try:
        target.touch(mode=0o600, exist_ok=False)
    except OSError as error:
        raise StorageError(f"{target}: can't be made: {error.strerror}") from error
    try:
        with (
            closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(target)) as copy,
        ):
            source.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it
    except sqlite3.Error as error:
        target.unlink(missing_ok=True)
        raise storage_error(path, error) from error


def schema_version(path: Path) -> int:
    """How many migrations a database file has had. Raises StorageError."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            return int(connection.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.Error as error:
        raise storage_error(path, error) from error


def copy_before_migration(path: Path, version: int) -> Path:
    """Where the copy lies that is made before a file of an earlier version is brought forward."""
    return path.with_name(f"{path.name}.schema-{version}")


def _migrate(path: Path, connection: sqlite3.Connection, migrations: Sequence[str]) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(migrations):
        raise StorageError(
            f"{path}: written by a newer version (schema {version}, this one knows {len(migrations)})",
            hint="install the newer version, or restore a backup made before the update",
        )
    if 0 < version < len(migrations):
        copy = copy_before_migration(path, version)
        copy.unlink(missing_ok=True)  # of an attempt that failed
        copy_database(path, copy)
    for number, script in enumerate(migrations[version:], start=version + 1):
        try:
            connection.executescript(f"BEGIN IMMEDIATE;\n{script}\n;PRAGMA user_version={number};\nCOMMIT;")
        except sqlite3.Error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
