"""Files that only their owner may read, written so that a crash leaves the old file or the new one."""

import ctypes
import os
import stat
import tempfile
from pathlib import Path

from fedcore.errors import ConfigError

# From <fcntl.h>.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def write_file(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace `path` atomically: temporary file in the same folder, fsync, rename, fsync of the folder."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder (and its parents) that only its owner may enter; an existing one is given that mode."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


def sync_folder(path: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> None:
    """Swap two existing paths of one file system in one step, so that a crash leaves each name with one of the two.

    Raises OSError where the kernel or the file system can't (ENOSYS, EINVAL).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    swapped = libc.renameat2(
        _AT_FDCWD, os.fsencode(one.absolute()), _AT_FDCWD, os.fsencode(other.absolute()), _RENAME_EXCHANGE
    )
    if swapped != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


def check_private(path: Path) -> None:
    """Raise ConfigError unless `path` is a file that only its owner may read or write."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from error
    if mode & 0o077:
        raise ConfigError(
            f"{path}: private key with mode {mode:04o}, expected 0600: others may have read it",
            hint=f"chmod 600 {path}; if others had access to this machine, replace the key (renew or enrol again)",
        )
