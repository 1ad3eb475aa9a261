"""One process a home, or an output folder: an advisory lock that the kernel releases with its holder.

The descriptor is closed on exec, so a child never keeps the lock held.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from fedcore.errors import ConflictError, StorageError


class HomeLock:
    """Holds the lock file while open. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def __enter__(self) -> Self:
        """Take the lock. Raises ConflictError if another process holds it."""
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._descriptor)
            raise ConflictError(
                f"{self._path.parent} is already served by process {holder}",
                hint="stop it first, or use another home",
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock."""
        os.close(self._descriptor)


def holder(path: Path) -> int | None:
    """The process that serves the home with this lock, None if none does; -1 if it can't be told which."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError:
        return -1
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.read(descriptor, 32).decode(errors="replace").strip()
        return int(text) if text.isdecimal() else -1
    finally:
        os.close(descriptor)
    return None


@contextmanager
def claimed(out: Path, program: str) -> Iterator[None]:
    """Make the output folder `out` if need be, and hold it.

    Raises ConflictError if another `program` holds it, StorageError if it can't be used.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise StorageError(f"{out}: can't be used: {error}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConflictError(
                f"{out}: another {program} uses this folder", hint="choose another with --out"
            ) from error
        yield
    finally:
        os.close(lock)
