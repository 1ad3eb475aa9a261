"""The operator's commands against the real coordinator, as programs, over mutual TLS."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedctl.demo_processes import ProcessGroup, child_environment, free_ports

pytestmark = pytest.mark.slow

PLAN = """
name = "blood"
rounds = 2
min_sites = 1
[model]
name = "cnn"
classes = 2
input = [1, 8, 8]
[data]
class_names = ["a", "b"]
"""


class Lab:
    """A coordinator with one enrolled site whose agent does not run, and an operator's settings."""

    def __init__(self, root: Path, group: ProcessGroup) -> None:
        self.root = root
        self.group = group
        self.home = root / "coordinator"
        self.port, enroll_port = free_ports(2)
        init = ["init", "--home", str(self.home), "--name", "lab", "--host", "127.0.0.1"]
        init += ["--port", str(self.port), "--enroll-port", str(enroll_port)]
        group.run("coordinator", [sys.executable, "-m", "fedserver.cli", *init])
        self.serve("coordinator")
        assert (
            self.fedctl("context", "add", "lab", "--credential", str(self.home / "operator")).returncode == 0
        )
        token = self.ok("enroll", "token", "create", "--site", "site-1")
        enroll = ["enroll", "--home", str(root / "site-1"), "--coordinator", token["coordinator"]]
        enroll += ["--token", token["token"], "--ca-fingerprint", token["ca_fingerprint"]]
        group.run("site-1", [sys.executable, "-m", "fedagent.cli", *enroll])

    def serve(self, name: str) -> None:
        command = [sys.executable, "-m", "fedserver.cli", "serve", "--home", str(self.home)]
        self.group.start(name, [*command, "--lifeline", "{lifeline}"])
        self.group.wait_for_port(name, self.port)

    def environment(self) -> dict[str, str]:
        return {**os.environ, "FEDIMPRES_CONFIG_DIR": str(self.root / "config")}

    def fedctl(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fedctl.app", *args],
            capture_output=True,
            text=True,
            timeout=270,
            check=False,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
        )

    def ok(self, *args: str) -> dict:
        ended = self.fedctl(*args, "-o", "json")
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    def reaches(self, run: str, state: str) -> bool:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.ok("run", "show", run)["state"] == state:
                return True
            time.sleep(0.2)
        return False

    def submit(self) -> str:
        plan = self.root / "plan.toml"
        plan.write_text(PLAN)
        return self.ok("run", "submit", str(plan))["run"]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    root = tmp_path_factory.mktemp("lab")
    (root / "logs").mkdir()
    with ProcessGroup(root / "logs", child_environment()) as group:
        yield Lab(root, group)


def test_who_and_what_is_there(lab: Lab) -> None:
    me = lab.ok("auth", "whoami")
    assert (me["federation"], me["role"]) == ("lab", "operator")
    status = lab.ok("status")
    assert [site["site"] for site in status["sites"]] == ["site-1"]
    assert any("site-1" in problem for problem in status["problems"])
    assert lab.ok("site", "show", "site-1")["connected"] is False


def test_a_sites_credential_is_denied_with_4(lab: Lab) -> None:
    lab.fedctl("context", "add", "site", "--credential", str(lab.root / "site-1" / "credential"))
    ended = lab.fedctl("--context", "site", "run", "list")
    assert ended.returncode == 4
    assert ended.stderr.startswith("error[permission_denied]:")


def test_a_run_that_waits_is_shown_paused_resumed_and_aborted(lab: Lab) -> None:
    run = lab.submit()
    assert lab.ok("run", "show", run)["sites"] == ["site-1"]
    assert lab.ok("run", "show", run[:-1])["run"] == run, "a unique beginning will do"
    waited = lab.fedctl("run", "wait", run, "--timeout", "1s")
    assert waited.returncode == 5
    assert "has not ended within 1.0 s" in waited.stderr
    lab.ok("run", "pause", run)
    assert lab.reaches(run, "PAUSED"), "once what was under way has ended"
    assert lab.ok("run", "resume", run)["state"] in ("WAITING", "RUNNING", "QUEUED")
    again = lab.fedctl("run", "resume", run)
    assert (again.returncode, f"run {run} is not paused" in again.stderr) == (7, True)
    refused = lab.fedctl("run", "abort", run)
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    assert lab.ok("run", "abort", run, "--yes", "--reason", "enough")["state"] == "ABORTED"
    ended = lab.fedctl("run", "wait", run, "-o", "json")
    assert ended.returncode == 1
    over = json.loads(ended.stdout)
    assert (over["state"], over["progress"]) == ("ABORTED", []), "nobody works for it any more"
    assert lab.ok("run", "rounds", run) == {"rounds": []}
    assert run in [row["run"] for row in lab.ok("run", "list")["runs"]]


def test_what_is_not_there_is_6_what_contradicts_is_7(lab: Lab) -> None:
    run = lab.submit()
    lab.ok("run", "abort", run, "--yes")
    assert lab.fedctl("run", "show", "nothing-such").returncode == 6
    assert lab.fedctl("model", "download", run).returncode == 6
    over = lab.fedctl("run", "pause", run)
    assert (over.returncode, "is over (ABORTED): there is nothing to pause" in over.stderr) == (7, True)
    bad = lab.root / "bad.toml"
    bad.write_text("colour = 1\n" + PLAN)
    refused = lab.fedctl("run", "submit", str(bad))
    assert refused.returncode == 78
    assert "unknown key 'colour'" in refused.stderr


def test_watch_goes_on_through_a_restart_of_the_coordinator(lab: Lab) -> None:
    run = lab.submit()
    watch = subprocess.Popen(
        [sys.executable, "-m", "fedctl.app", "run", "watch", run, "-o", "jsonl"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=lab.environment(),
    )
    assert watch.stdout is not None
    assert json.loads(watch.stdout.readline())["run"] == run
    (old,) = lab.group._running.values()
    os.kill(old.pid, signal.SIGKILL)
    old.wait()
    lab.group._running.clear()
    lab.serve("coordinator-again")
    lab.ok("run", "abort", run, "--yes")
    out, err = watch.communicate(timeout=270)
    assert json.loads(out.splitlines()[-1])["state"] == "ABORTED"
    assert "connection lost" in err
    assert "connected again" in err
    assert watch.returncode == 0
