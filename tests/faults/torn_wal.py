"""A write-ahead log of SQLite that has lost its end, as a disk leaves it that was cut off in the middle of a write."""

import os
import shutil
import sqlite3
import struct
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24


def tear(database: Path, records: int, confirmed: int) -> int:
    """Cut the log so that the journal ends `records` records earlier than the one that was `confirmed` last, or more, in
    the middle of the page that would have gone on. (A program that was killed may have written more than it told of.)
    Nobody may have the file open. Returns how many confirmed records are lost.
    """
    wal = database.with_name(f"{database.name}-wal")
    for keep, following in reversed(list(_boundaries(wal))):
        lost = confirmed - _last_record(database, wal, keep)
        if lost >= records:
            os.truncate(wal, keep + (following - keep) // 2)
            # It is an index of the log, made anew by who opens it.
            database.with_name(f"{database.name}-shm").unlink(missing_ok=True)
            return lost
    raise AssertionError("the log was emptied into the database meanwhile: nothing can be torn off")


def _boundaries(wal: Path) -> Iterator[tuple[int, int]]:
    """Ends of transactions, each with the end of the frame after it; frames of an earlier use of the file are left out."""
    data = wal.read_bytes()
    (page_bytes,) = struct.unpack_from(">I", data, 8)
    salts, size = data[16:24], _FRAME_HEADER_BYTES + page_bytes
    yield _HEADER_BYTES, _HEADER_BYTES + size
    at = _HEADER_BYTES
    while at + size <= len(data) and data[at + 8 : at + 16] == salts:
        (pages_after_commit,) = struct.unpack_from(">I", data, at + 4)
        at += size
        if pages_after_commit:
            yield at, at + size


def _last_record(database: Path, wal: Path, wal_bytes: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / database.name
        shutil.copy(database, copy)
        copied = copy.with_name(f"{copy.name}-wal")
        shutil.copy(wal, copied)
        os.truncate(copied, wal_bytes)
        with closing(sqlite3.connect(copy)) as connection:
            return int(connection.execute("SELECT coalesce(max(seq), 0) FROM journal").fetchone()[0])
