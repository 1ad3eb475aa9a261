"""What systemd is told, received on a socket that stands in for its own."""

import asyncio
import os
import re
import socket
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcore import compute_worker
from fedcore.compute_host import ComputeHost
from fedcore.service_manager import ServiceManager
from tests.federation_fixture import held

CHILD = """
import os
import time
from fedcore import compute_worker
compute_worker.BEAT_S = 0.1

def work(args, job):
    while not os.path.exists(args["until"]):
        time.sleep(0.01)
    return {}

if __name__ == "__main__":
    compute_worker.serve({"work": work})
"""


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "notify"))
        server.setblocking(False)
        yield server


def heard(server: socket.socket) -> list[str]:
    found = []
    while True:
        try:
            found.append(server.recv(4096).decode())
        except BlockingIOError:
            return found


def test_each_word_is_one_datagram(systemd):
    manager = ServiceManager(systemd.getsockname(), None)
    manager.ready()
    manager.status("serves\nREADY=0")
    manager.stopping()
    assert heard(systemd) == ["READY=1", "STATUS=serves READY=0", "STOPPING=1"]


def test_an_abstract_socket_is_reached():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(f"\0fedimpres-test-{os.getpid()}")
        server.setblocking(False)
        ServiceManager(f"@fedimpres-test-{os.getpid()}", None).ready()
        assert heard(server) == ["READY=1"]


@pytest.mark.parametrize(
    ("environ", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid())}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_environment_is_read_once_and_passed_to_no_child(environ, watchdog_s, systemd):
    environ = {"PATH": "/bin", "NOTIFY_SOCKET": systemd.getsockname(), **environ}
    manager = ServiceManager.from_environment(environ)
    assert manager.watchdog_s == watchdog_s
    assert environ == {"PATH": "/bin"}
    manager.ready()
    assert heard(systemd) == ["READY=1"]


async def next_heard(server: socket.socket) -> str:
    return (await asyncio.get_running_loop().sock_recv(server, 4096)).decode()


@pytest.mark.parametrize("address", ["", "relative", "/no/such/socket"])
def test_nobody_listening_harms_nothing(address):
    manager = ServiceManager.from_environment({"NOTIFY_SOCKET": address})
    manager.ready()
    asyncio.run(manager.watch(lambda: ""))


def test_signs_of_life_stop_while_the_service_is_stuck(systemd):
    async def story() -> None:
        stuck = ""
        manager = ServiceManager(systemd.getsockname(), 0.06)
        watching = asyncio.create_task(manager.watch(lambda: stuck))
        for _ in range(3):
            assert await next_heard(systemd) == "WATCHDOG=1"
        stuck = "the compute process has been silent"
        heard(systemd)
        await asyncio.sleep(0.15)
        assert heard(systemd) == []
        stuck = ""
        assert await next_heard(systemd) == "WATCHDOG=1"
        watching.cancel()

    asyncio.run(asyncio.wait_for(story(), 60))


def test_a_compute_process_beats_while_it_works_and_is_stuck_when_it_is_stopped(tmp_path):
    (tmp_path / "beating_child.py").write_text(textwrap.dedent(CHILD))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    host = ComputeHost("beating_child", environment={"PYTHONPATH": path})

    over = tmp_path / "over"

    async def story() -> None:
        working = asyncio.create_task(host.run("work", {"until": str(over)}))
        for _ in range(3):  # signs of life come without progress
            since = host._heard_at
            while host._heard_at == since:
                await asyncio.sleep(0.02)
        assert host.pid is not None
        with held(host.pid):
            while not host.stuck(0.5):
                await asyncio.sleep(0.02)
            assert re.fullmatch(
                r"the compute process has been silent for \d+ s during 'work'", host.stuck(0.5)
            )
            assert host.stuck(None) == ""
        over.touch()
        await working
        await asyncio.sleep(0.6)
        assert host.stuck(0.5) == "", "idle for longer than the limit is not stuck"

    async def closed() -> None:
        try:
            await asyncio.wait_for(story(), 120)
        finally:
            await host.close()

    asyncio.run(closed())


def test_a_beat_comes_well_within_the_units_watchdog():
    # WatchdogSec of deploy/systemd; tests/unit/deploy holds the units to it.
    assert 4 * compute_worker.BEAT_S <= 60
