"""Calls that wait for the disk, counted: what a round costs in fsyncs is a figure, not a guess."""

import os
import threading

_lock = threading.Lock()
_count = 0


def sync_data(descriptor: int) -> None:
    """Make a file's bytes durable."""
    counted()
    os.fdatasync(descriptor)


def sync_file(descriptor: int) -> None:
    """Make a file's, or a folder's, bytes and entries durable."""
    counted()
    os.fsync(descriptor)


def counted() -> None:
    """Count a wait for the disk that somebody else makes: SQLite's, at a commit."""
    global _count  # noqa: PLW0603 - one disk, one counter
    with _lock:
        _count += 1


def syncs_so_far() -> int:
    """Waits for the disk since this process began."""
    return _count
