"""A pipe whose end of file ends the child: nothing outlives its parent, whatever ends the parent.

The parent keeps the write end and never writes; the child gets the read end (`--lifeline FD`). The kernel
closes the write end when the parent ends, `kill -9` included. PDEATHSIG would fire when the *thread* that
spawned the child ends.
"""

import os
import stat
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from fedcore.errors import ConfigError


class Lifeline:
    """The parent's side. Give `read_fd` to children with `pass_fds`; closing ends them.

    Both ends are closed on exec, so a child holds only the end that it was given.
    """

    def __init__(self) -> None:
        self.read_fd, self._write_fd = os.pipe()
        self._open = True

    def close(self) -> None:
        """Let go: every child sees the end of the pipe. May be called again."""
        if self._open:
            self._open = False
            os.close(self._write_fd)
            os.close(self.read_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def watch(fd: int, on_end: Callable[[], object], grace_s: float = 10.0) -> threading.Thread:
    """The child's side: call `on_end` from a daemon thread once the parent is gone.

    A process that is still there `grace_s` seconds later is ended hard, so that a shutdown that hangs leaves
    nothing behind. `fd` is not passed on to grandchildren. Raises ConfigError if `fd` is not an open pipe.
    """
    try:
        mode = os.fstat(fd).st_mode
    except OSError as error:
        raise ConfigError(f"--lifeline {fd}: not an open file descriptor") from error
    if not stat.S_ISFIFO(mode):
        raise ConfigError(f"--lifeline {fd}: not a pipe")
    os.set_inheritable(fd, False)
    thread = threading.Thread(target=_wait, args=(fd, on_end, grace_s), name="lifeline", daemon=True)
    thread.start()
    return thread


def _wait(fd: int, on_end: Callable[[], object], grace_s: float) -> None:
    try:
        while os.read(fd, 4096):
            pass
    except OSError:
        pass  # The descriptor was closed under us: no way left to hear of the parent.
    try:
        on_end()
    finally:
        time.sleep(grace_s)
        os._exit(1)
