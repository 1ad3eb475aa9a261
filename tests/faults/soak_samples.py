"""What the processes of a federation hold, read from /proc every few seconds: a series for each life of a process."""

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.federation_fixture import Federation, children

MEASURES = ("rss_mb", "descriptors", "threads")


@dataclass
class Life:
    """One process from its start to its end. `times_s` are since the soak began."""

    role: str
    pid: int
    times_s: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Between the first and the last sample."""
        return self.times_s[-1] - self.times_s[0]


class Sampler:
    """Samples in a thread of its own until it is closed. Read `lives` and `disk` afterwards."""

    def __init__(self, federation: Federation, every_s: float) -> None:
        self.lives: dict[tuple[str, int], Life] = {}
        # Seconds, then MB by home.
        self.disk: list[dict[str, float]] = []
        self._federation = federation
        self._names = tuple(federation.programs)
        self._every_s = every_s
        self._began = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="sampler", daemon=True)
        self._thread.start()

    def now_s(self) -> float:
        """Seconds since the soak began."""
        return time.monotonic() - self._began

    def close(self) -> None:
        """End. Raises AssertionError if the thread had ended by itself."""
        alive = self._thread.is_alive()
        self._over.set()
        self._thread.join()
        assert alive, "the sampler died; see its traceback"

    def _sample(self) -> None:
        while not self._over.is_set():
            for name in self._names:
                # A killed one is missing until it is started again.
                if (program := self._federation.programs.get(name)) is None:
                    continue
                self._look(name, program.pid)
                for child in children(program.pid)[:1]:
                    self._look(f"{name} compute", child)
            homes = {name: _disk_mb(self._federation.root / name) for name in self._names}
            self.disk.append({"seconds": round(self.now_s(), 1), **homes})
            self._over.wait(self._every_s)

    def _look(self, role: str, pid: int) -> None:
        seen = _held(pid)
        if seen is None:
            return
        life = self.lives.setdefault((role, pid), Life(role, pid))
        life.times_s.append(round(self.now_s(), 2))
        for measure in MEASURES:
            getattr(life, measure).append(seen[measure])


def _held(pid: int) -> dict[str, Any] | None:
    """What a process holds; None if it has ended."""
    folder = Path(f"/proc/{pid}")
    try:
        pages = int((folder / "statm").read_text().split()[1])
        held = {
            "rss_mb": round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 2),
            "descriptors": len(os.listdir(folder / "fd")),
            "threads": len(os.listdir(folder / "task")),
        }
    except OSError:
        return None
    # Nobody holds no memory: it has ended, and its parent has not yet heard.
    return held if pages else None


def _disk_mb(home: Path) -> float:
    """Bytes of the files below a folder, some of which may be on their way in or out."""
    total = 0
    for folder, _, names in os.walk(home):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return round(total / 1e6, 3)
