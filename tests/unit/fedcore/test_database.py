"""Durability, isolation of one write from another, migrations, and files that are not well."""

import asyncio
import sqlite3
import threading
from pathlib import Path

import pytest

from fedcore.database import Database, open_database
from fedcore.errors import ConflictError, StorageError

FIRST = "CREATE TABLE t (n INTEGER PRIMARY KEY, w TEXT) STRICT"
SECOND = "ALTER TABLE t ADD COLUMN x TEXT; INSERT INTO t (n, x) VALUES (99, 'two; statements')"


@pytest.fixture
def database(tmp_path):
    database = open_database(tmp_path / "a.db", [FIRST], create=True)
    yield database
    database.close()


def insert(n: int):
    return lambda c: c.execute("INSERT INTO t (n) VALUES (?)", (n,)).lastrowid


def numbers(database: Database) -> list[int]:
    return [row["n"] for row in database.read(lambda c: c.execute("SELECT n FROM t ORDER BY n").fetchall())]


def test_a_write_gives_its_result_when_it_is_committed(database):
    assert asyncio.run(database.write(insert(7))) == 7
    with sqlite3.connect(database.path) as other:
        assert other.execute("SELECT n FROM t").fetchall() == [(7,)]
    other.close()


def test_settings_that_make_it_durable(database):
    pragmas = {
        name: database.write_now(lambda c, name=name: c.execute(f"PRAGMA {name}").fetchone()[0])
        for name in ("journal_mode", "synchronous", "foreign_keys")
    }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    assert database.path.stat().st_mode & 0o777 == 0o600


def test_waiting_writes_share_one_transaction_and_fail_alone(database):
    gate, entered = threading.Event(), threading.Event()

    def hold(connection: sqlite3.Connection) -> None:
        entered.set()
        gate.wait(10)

    def spoil(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO t (n) VALUES (1000)")
        raise ValueError("spoilt on purpose")

    async def scenario() -> list[object]:
        holding = asyncio.create_task(database.write(hold))
        await asyncio.to_thread(entered.wait, 10)
        tasks = [
            asyncio.create_task(database.write(fn))
            for fn in (insert(1), spoil, insert(2), insert(1), insert(3))
        ]
        await asyncio.sleep(0.05)
        changes: list[str] = []
        database._writer.set_trace_callback(changes.append)
        gate.set()
        await holding
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert changes.count("BEGIN IMMEDIATE") == 1
        return results

    results = asyncio.run(scenario())
    assert [results[0], results[2], results[4]] == [1, 2, 3]
    assert isinstance(results[1], ValueError)
    assert isinstance(results[3], StorageError)
    assert "UNIQUE" in str(results[3])
    assert numbers(database) == [1, 2, 3]


def test_a_read_does_not_see_what_is_not_committed_and_can_not_write(database):
    entered, gate = threading.Event(), threading.Event()

    def slow(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO t (n) VALUES (5)")
        entered.set()
        gate.wait(10)

    writer = threading.Thread(target=database.write_now, args=(slow,))
    writer.start()
    assert entered.wait(10)
    assert numbers(database) == [], "had it waited for the writer, it would see 5"
    gate.set()
    writer.join()
    assert numbers(database) == [5]
    with pytest.raises(StorageError, match="readonly"):
        database.read(lambda c: c.execute("DELETE FROM t"))


def test_a_cancelled_caller_leaves_the_writer_working(database):
    async def scenario() -> None:
        task = asyncio.create_task(database.write(insert(1)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await database.write(insert(2))

    asyncio.run(scenario())
    assert 2 in numbers(database)


def test_a_full_disk_is_told_and_survived(database):
    database.write_now(insert(1))
    pages = database.write_now(lambda c: c.execute("PRAGMA page_count").fetchone()[0])
    database._writer.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StorageError, match="full") as caught:
        database.write_now(lambda c: c.execute("INSERT INTO t (n, w) VALUES (2, ?)", ("x" * 100_000,)))
    assert "free space" in caught.value.hint
    database._writer.execute("PRAGMA max_page_count=100000")
    database.write_now(insert(3))
    assert numbers(database) == [1, 3]


def test_closing_finishes_what_waits_and_refuses_the_rest(tmp_path):
    database = open_database(tmp_path / "a.db", [FIRST], create=True)
    futures = [database._submit(insert(n)) for n in range(300)]
    database.close()
    database.close()
    assert [future.result() for future in futures][1:] == list(range(1, 300))
    for use in (lambda: database.write_now(insert(1)), lambda: database.read(lambda c: None)):
        with pytest.raises(StorageError, match="closed"):
            use()


def test_migrations_run_once_in_order_and_keep_what_is_there(tmp_path):
    path = tmp_path / "a.db"
    first = open_database(path, [FIRST], create=True)
    first.write_now(insert(1))
    first.close()
    for _ in range(2):
        second = open_database(path, [FIRST, SECOND])
        assert numbers(second) == [1, 99]
        second.close()
    with pytest.raises(StorageError, match="newer version") as caught:
        open_database(path, [FIRST])
    assert "install the newer version" in caught.value.hint


def test_a_migration_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "a.db"
    open_database(path, [FIRST], create=True).close()
    with pytest.raises(StorageError, match="no such table"):
        open_database(path, [FIRST, "ALTER TABLE t ADD COLUMN x TEXT; INSERT INTO absent VALUES (1)"])
    again = open_database(path, [FIRST])
    assert again.read(lambda c: [row["name"] for row in c.execute("PRAGMA table_info(t)")]) == ["n", "w"]
    again.close()


def test_missing_existing_and_damaged_files(tmp_path: Path):
    path = tmp_path / "a.db"
    with pytest.raises(StorageError, match="no such database"):
        open_database(path, [FIRST])
    assert not path.exists()
    database = open_database(path, [FIRST], create=True)
    for n in range(2000):
        database._submit(insert(n))
    database.close()
    with pytest.raises(ConflictError, match="already there"):
        open_database(path, [FIRST], create=True)
    data = bytearray(path.read_bytes())
    data[4096 : 4096 + 600] = b"\xaa" * 600
    path.write_bytes(data)
    with pytest.raises(StorageError) as caught:
        open_database(path, [FIRST])
    assert "backup" in caught.value.hint
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(StorageError, match="not a database") as caught:
        open_database(path, [FIRST])
    assert "backup" in caught.value.hint


class Unwell:
    """The writer's connection, on which statements fail as they do on a disk that is dying."""

    def __init__(self, connection: sqlite3.Connection, failing: set[str]) -> None:
        self._connection = connection
        self.failing = failing

    def __getattr__(self, name: str):
        return getattr(self._connection, name)

    def execute(self, sql: str, *values):
        if sql in self.failing:
            raise sqlite3.OperationalError(f"disk I/O error in {sql}")
        return self._connection.execute(sql, *values)


@pytest.mark.parametrize(
    "failing",
    [
        {"COMMIT", "ROLLBACK"},
        {"BEGIN IMMEDIATE"},
        {"RELEASE one_write"},
        {"SAVEPOINT one_write"},
    ],
)
def test_a_writer_whose_rollback_fails_tells_so_and_works_again(database, failing):
    database._writer = unwell = Unwell(database._writer, failing)
    for n in (1, 2):
        with pytest.raises(StorageError, match="disk I/O error|within a transaction"):
            database._submit(insert(n)).result(timeout=10)
    unwell.failing = set()
    database._submit(lambda c: None).exception(timeout=10)  # it may only undo what the failed ones left
    assert database._submit(insert(3)).result(timeout=10) == 3
    assert numbers(database) == [3]


def test_a_write_that_can_not_be_undone_takes_its_group_with_it(database):
    """Else its half would be committed along with the others."""
    database._writer = unwell = Unwell(database._writer, {"ROLLBACK TO one_write"})

    def spoil(connection: sqlite3.Connection) -> None:
        connection.execute("INSERT INTO t (n) VALUES (1000)")
        raise ValueError("spoilt on purpose")

    with pytest.raises(StorageError, match="ROLLBACK TO"):
        database._submit(spoil).result(timeout=10)
    unwell.failing = set()
    assert database._submit(insert(1)).result(timeout=10) == 1
    assert numbers(database) == [1]


def test_whatever_a_write_raises_the_writer_goes_on(database):
    def leave(connection: sqlite3.Connection) -> None:
        raise SystemExit(3)

    with pytest.raises(StorageError, match="not stored: SystemExit: 3"):
        database._submit(leave).result(timeout=10)
    assert database._submit(insert(1)).result(timeout=10) == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_dead_writer(database, monkeypatch):
    entered, gate = threading.Event(), threading.Event()

    def die(group) -> None:
        entered.set()
        gate.wait(10)
        raise RuntimeError("a bug")

    monkeypatch.setattr(database, "_perform", die)
    futures = [database._submit(insert(1))]
    assert entered.wait(10)
    futures += [database._submit(insert(n)) for n in range(2, 600)]
    gate.set()
    for future in futures:
        with pytest.raises(StorageError, match="the writer has failed: RuntimeError: a bug") as caught:
            future.result(timeout=10)
    assert "restart the program" in caught.value.hint
    with pytest.raises(StorageError, match="the writer has failed"):
        database._submit(insert(1))
    with pytest.raises(StorageError, match="the writer has failed"):
        asyncio.run(asyncio.wait_for(database.write(insert(1)), 10))
    assert numbers(database) == []
