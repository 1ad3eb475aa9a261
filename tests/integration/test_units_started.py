"""The units' own ExecStart under their system call filter, with a socket in systemd's place."""

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.federation_fixture import Federation, children, digits_plan, gone, wait_until

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
# Longer than a beat of the compute process (5 s), far shorter than the unit's own.
WATCHDOG_S = 9.0


class Manager:
    """Stands in for systemd: starts a unit's program and keeps what it says."""

    def __init__(self, root: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(root / "notify"))
        self._socket.setblocking(False)
        self.environment = {
            "NOTIFY_SOCKET": str(root / "notify"),
            "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6)),
        }
        self.said: list[str] = []

    def close(self) -> None:
        self._socket.close()

    def hear(self) -> list[str]:
        """All that was said so far."""
        while True:
            try:
                self.said.append(self._socket.recv(4096).decode())
            except BlockingIOError:
                return self.said


@contextmanager
def started(federation: Federation, name: str, unit: str, home: Path, tmp_path: Path) -> Iterator[Manager]:
    """A program of the federation replaced by the unit's ExecStart; afterwards it is as before."""
    program = federation.programs.pop(name)
    program.terminate()
    assert program.wait(15) == 0
    path = ROOT / "deploy" / "systemd" / f"{unit}.service"
    (line,) = [line for line in path.read_text().splitlines() if line.startswith("ExecStart=")]
    binary, *words = shlex.split(line.removeprefix("ExecStart="))
    assert binary == f"/opt/fedimpres/current/bin/{unit}"
    words = [str(home) if word == f"/var/lib/{unit}" else word for word in words]
    command = [Path(sys.executable).parent / unit, *words]
    manager = Manager(tmp_path)
    with federation.log_path(name).open("ab") as log:
        running = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "under_unit.py", path, "--", *command],
            env={**federation.environment(), **manager.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    federation.programs[name] = running
    try:
        yield manager
        running.terminate()
        assert running.wait(20) == 0
        assert "STOPPING=1" in manager.hear()
    finally:
        running.kill()
        running.wait()
        manager.close()
        del federation.programs[name]


def test_the_agents_unit_trains_and_gives_signs_of_life_until_it_is_stuck(
    federation: Federation, tmp_path: Path
) -> None:
    site = "clinic-c"
    with started(federation, site, "fedagent", federation.site_home(site), tmp_path) as manager:
        wait_until(lambda: "READY=1" in manager.hear(), "READY")
        federation.wait_connected(site)
        wait_until(lambda: "STATUS=connected; idle" in manager.hear(), "STATUS")
        run = federation.submit(digits_plan([site], rounds=1))
        assert federation.wait(run).state == "DONE"
        before = manager.hear().count("WATCHDOG=1")
        wait_until(lambda: manager.hear().count("WATCHDOG=1") >= before + 3, "idle and alive", 20)

        (compute,) = children(federation.programs[site].pid)
        since = federation.log_size(site)
        os.kill(compute, signal.SIGSTOP)
        run = federation.submit(digits_plan([site], rounds=1))
        stuck = "no sign of life is given to the watchdog"
        wait_until(lambda: stuck in federation.log(site, since), "the stuck compute process is told", 30)
        before = manager.hear().count("WATCHDOG=1")
        with pytest.raises(AssertionError, match="no sign of life"):
            wait_until(lambda: manager.hear().count("WATCHDOG=1") > before, "no sign of life", WATCHDOG_S)
        os.kill(compute, signal.SIGCONT)
        assert federation.wait(run).state == "DONE"
        pid = compute
    wait_until(lambda: gone(pid), "the compute process ends with its agent")


def test_the_coordinators_unit_says_when_it_serves_and_when_it_stops(
    federation: Federation, tmp_path: Path
) -> None:
    with started(federation, "coordinator", "fedserver", federation.server_home, tmp_path) as manager:
        wait_until(lambda: "READY=1" in manager.hear(), "READY")
        assert manager.hear()[0].startswith("STATUS=serves federation lab at ")
        federation.wait_connected("clinic-a", "clinic-b")
        run = federation.submit(digits_plan(["clinic-a", "clinic-b"], rounds=1))
        assert federation.wait(run).state == "DONE"
        assert "WATCHDOG=1" in manager.hear()
