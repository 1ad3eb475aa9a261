"""Programs of this machine that live as long as the demo and not a moment longer."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from fedcore.errors import ComputeError, UnreachableError
from fedcore.lifeline import Lifeline

STOP_GRACE_S = 10.0
_LAST_LINES = 15


class ProcessGroup:
    """Starts programs with a lifeline, notices when one dies, and ends all.

    Each writes to its own log file. They end with `close`, and by themselves when this process ends in any
    other way: `{lifeline}` in their arguments stands for the descriptor whose end of file tells them.
    """

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self._logs = logs
        self._environment = dict(environment)
        self._lifeline = Lifeline()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        # Short programs that other threads wait for just now.
        self._short: set[subprocess.Popen[bytes]] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a program that is to run until the end."""
        with self._log_path(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                [part.replace("{lifeline}", str(self._lifeline.read_fd)) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                pass_fds=[self._lifeline.read_fd],
                # Ctrl-C on the terminal is the demo's to handle, in its order.
                start_new_session=True,
            )

    def run(self, name: str, command: Sequence[str], timeout_s: float = 60.0) -> None:
        """Run a short program to its end. Raises ComputeError with its last words if it fails."""
        with self._log_path(name).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        self._short.add(process)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise ComputeError(f"{name}: {_said(command)} did not end within {timeout_s:.0f} s") from error
        finally:
            process.kill()
            process.wait()
            self._short.discard(process)
        if code != 0:
            raise self._failure(name, f"{_said(command)} ended with exit code {code}")

    def pid(self, name: str) -> int:
        """Process id of a program that was started."""
        return self._running[name].pid

    def check(self) -> None:
        """Raise ComputeError, with its last words, if a program has ended that should run."""
        for name, process in self._running.items():
            if (code := process.poll()) is not None:
                how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
                raise self._failure(name, f"ended unexpectedly with {how}")

    def wait_for_port(self, name: str, port: int, timeout_s: float = 60.0) -> None:
        """Wait until a program listens on a loopback port. Raises ComputeError if it dies,
        UnreachableError.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check()
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
            except OSError:
                time.sleep(0.1)
            else:
                return
        raise UnreachableError(
            f"{name} does not listen on port {port} after {timeout_s:.0f} s",
            hint=f"see {self._log_path(name)}",
        )

    def close(self) -> None:
        """End all: SIGTERM in the reverse order of their start, the lifeline, and SIGKILL after
        STOP_GRACE_S.
        """
        processes = list(reversed(self._running.values()))
        self._running = {}
        try:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
            deadline = time.monotonic() + STOP_GRACE_S
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            # Also when a second Ctrl-C cuts the wait short.
            self._lifeline.close()
            for process in [*processes, *self._short]:
                if process.poll() is None:
                    process.kill()
                    process.wait()

    def _log_path(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _failure(self, name: str, what: str) -> ComputeError:
        path = self._log_path(name)
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:]
        except OSError:
            lines = []
        words = "\n".join(f"  {line}" for line in lines) or "  (nothing)"
        return ComputeError(f"{name}: {what}; its last words:\n{words}", hint=f"all of its log: {path}")


def child_environment() -> dict[str, str]:
    """The environment of the demo's programs: ours, with one thread for each library that would take all
    cores.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def free_ports(count: int) -> list[int]:
    """Loopback ports that nobody listens on. They lie below the range from which outgoing connections draw theirs, and are
    kept for this process until it ends: another one that looks meanwhile gets others.
    """
    draw = random.SystemRandom()
    found: list[int] = []
    for _ in range(1000):
        port = draw.randrange(20_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if _claim(port):
            found.append(port)
        if len(found) == count:
            return found
    raise UnreachableError("no free port between 20000 and 32000 on the loopback interface")


def _claim(port: int) -> bool:
    """Whether a port is this process's from now on. Who starts a program that is to listen can't bind the port itself, so
    a name stands for it, of the kind that the kernel forgets with the process.
    """
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0fedimpres-port-{port}")
    except OSError:
        claim.close()
        return False
    claim.detach()
    return True


def _said(command: Sequence[str]) -> str:
    # `python -m fedserver.cli init --home ...` -> "fedserver init"
    module = command[2].partition(".")[0] if len(command) > 3 and command[1] == "-m" else command[0]
    return f"{module} {command[3]}" if len(command) > 3 else module
