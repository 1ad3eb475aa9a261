"""What a power cut leaves of a program's files, which kill -9 does not show: the page cache outlives the process.

Programs run with `preload/world.c`, which notes how long a file was when it was synced. At the cut each file loses what
came after that; a file that was never synced is empty. What lay there when the program started is durable. Bytes written
anew in the middle of a file and names in a folder that was not synced are taken for durable.
"""

import os
from pathlib import Path


class Durable:
    """What of the files below `home` is durable. Made before the program starts, which adds to the file `notes`."""

    def __init__(self, home: Path, notes: Path) -> None:
        self._home = home
        self._notes = notes
        notes.unlink(missing_ok=True)
        self._before = {found.st_ino: found.st_size for found in map(Path.stat, self._files())}

    def cut_power(self) -> list[str]:
        """Take the rest away, once the program is dead. Returns which files became shorter."""
        synced = dict(self._before)
        if self._notes.exists():
            for line in self._notes.read_text().splitlines():
                inode, size = map(int, line.split())
                synced[inode] = max(size, synced.get(inode, 0))
        shortened = []
        for path in self._files():
            found = path.stat()
            if found.st_size > (durable := synced.get(found.st_ino, 0)):
                os.truncate(path, durable)
                shortened.append(str(path.relative_to(self._home)))
        return shortened

    def _files(self) -> list[Path]:
        return [path for path in self._home.rglob("*") if path.is_file() and not path.is_symlink()]
