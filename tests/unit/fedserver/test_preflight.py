"""Preflight finds what would stop `serve`, and nothing else."""

import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedcore.errors import ConfigError
from fedcore.finding import Verdict
from fedctl.demo_processes import free_ports
from fedserver.config import ServerHome
from fedserver.initialise import initialise
from fedserver.preflight import check_name, check_port, preflight

NOW = datetime.now(UTC)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    port, enroll_port = free_ports(2)
    made = tmp_path / "home"
    initialise(made, name="lab", host="localhost", port=port, enroll_port=enroll_port, now=NOW)
    config = ServerHome(made).config
    config.write_text(config.read_text() + '\n[compute]\ndevice = "cpu"\n')
    return made


def test_a_fresh_home_may_serve(home: Path) -> None:
    # In a process of its own: the command sets up the logs of its process.
    words = [sys.executable, "-m", "fedserver.cli", "preflight", "--home", str(home)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=270, check=False)
    assert done.returncode == 0, done
    names = [line.split()[1] for line in done.stdout.splitlines()]
    assert [*dict.fromkeys(names)] == ["home", "name", "port", "enrolment", "disk", "device"]
    assert "FAIL" not in done.stdout


def test_a_damaged_credential_and_a_device_that_is_not_there_are_told(home: Path) -> None:
    (ServerHome(home).credential / "tls.key").unlink()
    config = ServerHome(home).config
    config.write_text(config.read_text().replace('device = "cpu"', 'device = "cuda:97"'))
    found = {finding.name: finding for finding in preflight(home, NOW)}
    assert found["home"].verdict is Verdict.FAILED
    assert "tls.key" in found["home"].text
    assert found["device"].verdict is Verdict.FAILED
    assert "cuda:97" in found["device"].text
    assert found["disk"].verdict is Verdict.OK


def test_a_port_in_use_and_a_name_that_nobody_knows() -> None:
    with socket.create_server(("127.0.0.1", 0)) as there:
        finding = check_port("port", "127.0.0.1", there.getsockname()[1])
    assert (finding.verdict, "in use" in finding.text) == (Verdict.FAILED, True)
    assert check_name("no-such-host.invalid").verdict is Verdict.WARNING
    assert check_name("localhost").verdict is Verdict.OK


def test_what_is_no_home_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no coordinator's home: fedserver.toml is missing"):
        list(preflight(tmp_path, NOW))
