"""Where the journal ended, kept beside the database: SQLite drops a torn end of its log in silence.

The note is written after the transaction and not fsynced, so after a power cut it may be older than the journal, but never
newer than what was confirmed. A journal that ends before the note has lost records that somebody was told of. What they
said is found out again: sites are asked for updates that the journal no longer holds, and make the same bytes.
"""

import os
import sqlite3
from contextlib import suppress
from pathlib import Path

import structlog

from fedcore.database import Database

_DIGITS = 20
log = structlog.get_logger(__name__)


class JournalEnd:
    """The note in one coordinator's home."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def note(self, last: int) -> None:
        """Keep the number of the last record. What the disk does not take is left out: the journal is what counts."""
        with suppress(OSError):
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(descriptor, f"{last:0{_DIGITS}d}\n".encode(), 0)
            finally:
                os.close(descriptor)

    def noted(self) -> int:
        """The last record that was noted; 0 if there is no note, or none that can be read."""
        try:
            return int(self._path.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return 0

    def lost(self, database: Database) -> int:
        """How many confirmed records the journal has lost at its end, which is logged. Call before any is added."""
        last = database.read(last_record)
        lost = max(0, self.noted() - last)
        if lost:
            log.error(
                "the journal has lost its last records: what they told is found out again",
                lost=lost,
                noted=self.noted(),
                last=last,
                hint="look at the disk; compare with the sites' logs: fedctl audit verify",
            )
        self.note(last)
        return lost


def last_record(connection: sqlite3.Connection) -> int:
    """The number of the journal's last record; 0 for an empty one."""
    (last,) = connection.execute("SELECT coalesce(max(seq), 0) FROM journal").fetchone()
    return int(last)
