"""A real federation for tests: the operators' commands, each a process of its own, over mutual TLS.

Every process carries a mark in its environment, so that none can hide at the end, compute processes included.
"""

import array
import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import sys
import termios
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedcore.data.benchmark_sets import load_benchmark, write_site
from fedctl.demo_plan import to_toml
from fedctl.demo_processes import free_ports
from tests.slow_line import SlowLine

T = TypeVar("T")
MARK = "FEDIMPRES_TEST_FEDERATION"
NAME = "lab"
CLASSES = tuple(str(n) for n in range(10))
SITES = ("clinic-a", "clinic-b", "clinic-c", "clinic-d")
# The site whose agent dials out through a proxy, `Federation.line`, where an upload can be held.
BEHIND_PROXY = SITES[3]
# Enrolled, with a credential of its own, but without an agent: tests speak for it.
PROBE = "probe"
# The site whose policy lets operators read its agent's log.
SHARING = "clinic-d"


def wait_until(condition: Callable[[], T], what: str, timeout_s: float = 120.0, every_s: float = 0.02) -> T:
    """Poll until `condition` gives something true, and give that.

    For what comes and stays. What passes again is missed on a busy machine: hold it still first.
    """
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:g} s"
        time.sleep(every_s)
    return found


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, as JSON."""
        return json.loads(self.out)


@dataclass
class Federation:
    """Homes below `root`, programs by name: "coordinator" and the sites."""

    root: Path
    port: int = 0
    enroll_port: int = 0
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    programs: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    # What the commands that built it printed, by what they did.
    journey: dict[str, Said] = field(default_factory=dict)
    # Through which the agent of BEHIND_PROXY dials out; only a federation of `build` has one.
    line: SlowLine | None = None
    # Where the coordinator and the agent of SHARING show their metrics; only a federation of `build` has these ports.
    metrics_ports: dict[str, int] = field(default_factory=dict)

    @property
    def server_home(self) -> Path:
        return self.root / "coordinator"

    def site_home(self, site: str) -> Path:
        return self.root / site

    def data(self, site: str) -> Path:
        return self.root / f"{site}.npz"

    def environment(self) -> dict[str, str]:
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("FEDIMPRES", "COVERAGE"))
        }
        return {
            **kept,
            MARK: self.mark,
            "XDG_CONFIG_HOME": str(self.root / "config"),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "200",
        }

    def command(self, program: str, *arguments: str, timeout_s: float = 270.0) -> Said:
        """One command to its end."""
        done = subprocess.run(
            _words(program, arguments),
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def ctl(self, *arguments: str, expect: int = 0, timeout_s: float = 270.0) -> Said:
        """`fedctl`, which must end with the exit code expected."""
        said = self.command("fedctl", *arguments, timeout_s=timeout_s)
        assert said.code == expect, f"fedctl {' '.join(arguments)}: {said}"
        return said

    def start(self, name: str, program: str, *arguments: str) -> None:
        with self.log_path(name).open("ab") as log:
            self.programs[name] = subprocess.Popen(
                _words(program, arguments),
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def log_path(self, name: str) -> Path:
        return self.root / f"{name}.log"

    def log(self, name: str, since: int = 0) -> str:
        """What a program logged, from a byte on."""
        with self.log_path(name).open("rb") as file:
            file.seek(since)
            return file.read().decode(errors="replace")

    def log_size(self, name: str) -> int:
        return self.log_path(name).stat().st_size

    # -- the parts ------------------------------------------------------------------------------

    def start_coordinator(self) -> None:
        since = self.log_size("coordinator") if self.log_path("coordinator").exists() else 0
        self.start("coordinator", "fedserver", "serve", "--home", str(self.server_home))

        def serves() -> bool:
            assert self.programs["coordinator"].poll() is None, self.log("coordinator", since)
            return "coordinator serves" in self.log("coordinator", since)

        wait_until(serves, "coordinator serves")

    def start_agent(self, site: str) -> None:
        self.start(site, "fedagent", "serve", "--home", str(self.site_home(site)))

    def enrol(self, site: str) -> None:
        """What `fedctl enroll token create` and `fedagent enroll` do, from this process."""
        from fedagent.enroll import enroll
        from fedcore.v1 import admin_pb2

        with self.admin() as admin:
            token = admin.call(
                lambda stub: stub.CreateToken, admin_pb2.CreateTokenRequest(site=site, ttl_s=900)
            )
        enroll(
            self.site_home(site),
            coordinator=token.coordinator,
            token=token.token,
            ca_fingerprint=token.ca_fingerprint,
        )

    def wait_connected(self, *sites: str) -> None:
        from fedcore.v1 import admin_pb2

        with self.admin() as admin:

            def connected() -> bool:
                reply = admin.call(lambda stub: stub.ListSites, admin_pb2.ListSitesRequest())
                return set(sites) <= {site.id for site in reply.sites if site.connected}

            wait_until(connected, f"{sites} connected")

    def admin(self) -> Any:
        """The operator's connection, for questions that are asked often."""
        from fedctl.admin import open_credential

        return open_credential(self.server_home / "operator")

    def kill(self, name: str) -> None:
        """`kill -9` of a program; its compute process is left to find out by itself."""
        self.programs[name].kill()
        self.programs.pop(name).wait()

    def compute_pid(self, name: str) -> int:
        """The compute process of a program that runs."""
        return wait_until(lambda: children(self.programs[name].pid), f"compute process of {name}")[0]

    def kill_with_compute(self, name: str) -> None:
        """`kill -9` of both processes, the compute process first."""
        for pid in children(self.programs[name].pid):
            os.kill(pid, signal.SIGKILL)
        self.kill(name)

    def stop(self) -> None:
        for program in self.programs.values():
            program.terminate()
        for program in self.programs.values():
            try:
                program.wait(20)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()
        if self.line is not None:
            self.line.close()

    def check_over(self) -> None:
        """Once it was stopped, nothing of it runs any more."""
        wait_until(lambda: not self.leftovers(), f"all processes gone, but there are {self.leftovers()}")

    def leftovers(self) -> list[str]:
        """Processes of this federation that still run, as "PID COMMAND"."""
        wanted = f"{MARK}={self.mark}".encode()
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found.append(f"{folder.name} {words}")
            except OSError:
                continue
        return found

    # -- phases held still ----------------------------------------------------------------------

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """A program and its compute process stand still: a machine that hangs."""
        with held(self.programs[name].pid, *children(self.programs[name].pid)):
            yield

    @contextmanager
    def hold_compute(self, name: str) -> Iterator[int]:
        """The compute process of a program, whose id this gives, stands still: no command of it can end."""
        pid = self.compute_pid(name)
        with held(pid):
            yield pid

    @contextmanager
    def uploading(self, document: Mapping[str, Any], num_bytes: int) -> Iterator[str]:
        """A new run in which the first update of BEHIND_PROXY is on its way and can't arrive: after about `num_bytes`
        its line carries nothing more.
        """
        assert self.line is not None
        with self.line.held_after(num_bytes):
            run = self.submit(document)
            wait_until(lambda: self.part(BEHIND_PROXY) is not None, "an upload")
            yield run

    def part(self, site: str) -> Path | None:
        """What the coordinator has of a site's update that is on its way."""
        parts = (self.server_home / "spool").glob(f"*~{site}~*.part")
        return next((path for path in parts if path.stat().st_size), None)

    @contextmanager
    def training(self, document: Mapping[str, Any], *sites: str) -> Iterator[str]:
        """A new run whose first round's training can't end: the compute processes of these sites stand still."""
        with ExitStack() as still:
            for site in sites:
                still.enter_context(self.hold_compute(site))
            run = self.submit(document)
            self.wait_phase(run, "training")
            yield run

    @contextmanager
    def aggregating(self, document: Mapping[str, Any]) -> Iterator[str]:
        """A new run whose first aggregation is asked for and can't end: the coordinator's compute process stands still."""
        with ExitStack() as still:
            with self.training(document, SITES[0]) as run:
                still.enter_context(self.hold_compute("coordinator"))
            self.wait_phase(run, "aggregating")
            yield run

    @contextmanager
    def second_round(self, document: Mapping[str, Any]) -> Iterator[str]:
        """A new run in its second round, in which the coordinator's compute process stands still: the round can't end,
        and neither can the impressions that are made beside its training.
        """
        first, second, *_ = document["sites"]
        with ExitStack() as still:
            with ExitStack() as evaluation:
                with self.training(document, first) as run:
                    others = len(document["sites"]) - 1
                    wait_until(lambda: self.journal(run).count("update_stored") == others, "other updates")
                    evaluation.enter_context(self.hold_compute(second))
                self.wait_phase(run, "evaluating")
                still.enter_context(self.hold_compute("coordinator"))
            wait_until(lambda: self.journal(run).count("round_opened") == 2, "the second round")
            yield run

    # -- runs -----------------------------------------------------------------------------------

    def plan(self, document: Mapping[str, Any]) -> Path:
        path = self.root / f"{document.get('name', 'plan')}-{uuid.uuid4().hex[:6]}.toml"
        path.write_text(to_toml(document), encoding="utf-8")
        return path

    def submit(self, document: Mapping[str, Any]) -> str:
        """Submit a plan; returns the run's id. Without a process of its own, for speed."""
        from fedctl.run_commands import submit_plan

        with self.admin() as admin:
            return submit_plan(admin, self.plan(document))

    def run(self, run: str) -> Any:
        """The run as the coordinator tells it."""
        from fedctl.admin import get_run

        with self.admin() as admin:
            return get_run(admin, run)

    def wait(self, run: str, timeout_s: float = 240.0) -> Any:
        """Wait for the end of a run; returns it as the coordinator tells it."""
        from fedctl.following import follow_run

        with self.admin() as admin:
            *_, last = follow_run(admin, run, on_trouble=lambda text: None, timeout_s=timeout_s)
        return last

    def wait_phase(self, run: str, phase: str, timeout_s: float = 120.0) -> Any:
        """Poll until a run is in a phase (or state) and give it. The phase must be one that can't pass meanwhile."""
        from fedctl.admin import get_run

        with self.admin() as admin:

            def reached() -> Any:
                message = get_run(admin, run)
                return message if phase in (message.phase, message.state) else None

            return wait_until(reached, f"run {run} {phase}", timeout_s)

    def rounds(self, run: str) -> list[dict[str, Any]]:
        from fedctl.admin import list_records

        with self.admin() as admin:
            return list_records(admin, run)

    def abort_all(self) -> None:
        """Leave no run for the next test."""
        from fedcore.v1 import admin_pb2

        final = {"DONE", "DEGRADED", "FAILED", "ABORTED"}
        with self.admin() as admin:
            for run in admin.call(lambda stub: stub.ListRuns, admin_pb2.ListRunsRequest()).runs:
                if run.state not in final:
                    request = admin_pb2.ControlRunRequest(run=run.run, reason="test over")
                    admin.call(lambda stub: stub.AbortRun, request)

    def journal(self, run: str) -> list[str]:
        """Kinds of the events that the journal holds of a run, in order."""
        uri = f"file:{self.server_home / 'fedserver.db'}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as database:
            rows = database.execute("SELECT kind FROM journal WHERE run = ? ORDER BY seq", (run,)).fetchall()
        return [kind for (kind,) in rows]


def children(pid: int) -> list[int]:
    """Process ids of a process's children."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except OSError:
            continue
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    return _state(Path(f"/proc/{pid}")) in ("Z", "")


@contextmanager
def held(*pids: int) -> Iterator[None]:
    """Processes stand still (SIGSTOP) from the beginning of this until it is left, in whatever way.

    They finish nothing, hear nothing, and can be killed.
    """
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            wait_until(lambda pid=pid: _stands_still(pid), f"process {pid} stands still")  # type: ignore[misc]
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def commanded(pid: int) -> bool:
    """Whether a compute process that stands still has been given a command: it waits, unread, in its stdin."""
    with open(f"/proc/{pid}/fd/0", "rb", buffering=0) as stdin:
        waiting = array.array("i", [0])
        fcntl.ioctl(stdin, termios.FIONREAD, waiting)
    return waiting[0] > 0


def _stands_still(pid: int) -> bool:
    """Whether every thread has stopped: the signal reaches one that is in a system call only at its end."""
    return all(_state(thread) == "T" for thread in Path(f"/proc/{pid}/task").iterdir())


def _state(folder: Path) -> str:
    """The letter of proc(5) for a process or thread; empty if it is no more."""
    try:
        return (folder / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def digits_plan(sites: Sequence[str] = SITES, **changes: Any) -> dict[str, Any]:
    """A small plan over the digits. `changes` replace keys, and keys within sections."""
    document: dict[str, Any] = {
        "name": "digits",
        "rounds": 2,
        "min_sites": 1,
        "strategy": "fedavg",
        "sites": list(sites),
        "seed": 7,
        "model": {"name": "cnn", "classes": 10, "input": [1, 8, 8]},
        "training": {"epochs": 1, "batch_size": 32, "learning_rate": 0.05},
        "synthesis": {"warmup_rounds": 1, "images": 20},
        # Long enough for a busy machine and for what a test holds still; what is to run out, a test sets.
        "limits": {"round_deadline_s": 300, "stall_timeout_s": 150, "join_wait_s": 1},
        "data": {"class_names": list(CLASSES)},
    }
    for key, value in changes.items():
        document[key] = {**document.get(key, {}), **value} if isinstance(value, dict) else value
    return document


def noop_plan(params: int, sites: Sequence[str] = SITES, **changes: Any) -> dict[str, Any]:
    """Updates of a chosen size, without training."""
    # A dotted key: `options.params` of the section [model].
    model = {"name": "noop", "options.params": params}
    return digits_plan(sites, **{"name": "noop", **changes, "model": model})


def build(root: Path, sites: Sequence[str] = SITES) -> Federation:
    """The operators' journey up to the connected agents. Each of its lines is a command; what is said again, to enrol the
    sites after the first, is said from this process, which saves seconds.
    """
    port, enroll_port, *shown = free_ports(4)
    made = Federation(
        root,
        port,
        enroll_port,
        line=SlowLine(),
        metrics_ports=dict(zip(("coordinator", SHARING), shown, strict=True)),
    )
    try:
        _build(made, sites)
    except BaseException:
        made.stop()
        raise
    return made


def _build(made: Federation, sites: Sequence[str]) -> None:
    ports = ("--port", str(made.port), "--enroll-port", str(made.enroll_port))
    home = ("--home", str(made.server_home))
    said = made.journey["init"] = made.command(
        "fedserver", "init", *home, "--name", NAME, "--host", "127.0.0.1", *ports
    )
    assert said.code == 0, said
    config = made.server_home / "fedserver.toml"
    shown = f"[metrics]\nport = {made.metrics_ports['coordinator']}\n"
    config.write_text(config.read_text() + "\nheartbeat_interval_s = 1.0\n[compute]\nthreads = 1\n" + shown)
    made.start_coordinator()
    operator = str(made.server_home / "operator")
    made.journey["context"] = made.ctl("context", "add", NAME, "--credential", operator)
    first, *others = sites
    token = made.journey[f"token {first}"] = made.ctl(
        "enroll", "token", "create", "--site", first, "--ttl", "15m", "-o", "json"
    )
    said = made.journey[f"enroll {first}"] = made.command(
        "fedagent", "enroll", "--home", str(made.site_home(first)),
        "--coordinator", token.json["coordinator"], "--token", token.json["token"],
        "--ca-fingerprint", token.json["ca_fingerprint"],
    )  # fmt: skip
    assert said.code == 0, said
    for site in (*others, PROBE):
        made.enrol(site)
    write_digits(made, sites)
    if SHARING in sites:
        (made.site_home(SHARING) / "policy.toml").write_text("share_logs = true\n")
    for site in sites:
        made.start_agent(site)
    made.wait_connected(*sites)


def write_digits(made: Federation, sites: Sequence[str]) -> None:
    """Deal the digits over the sites, with a test set of each site's own, and configure the agents."""
    dealt = load_benchmark("digits", None, sites=len(sites), alpha=0.5, seed=1)
    for site, split in zip(sites, dealt.sites.values(), strict=True):
        write_site(split, made.data(site))
        configure_agent(made, site, made.data(site))


def configure_agent(made: Federation, site: str, data: Path, class_names: Sequence[str] = CLASSES) -> None:
    """Write a site's agent.toml."""
    proxied = made.line is not None and site == BEHIND_PROXY
    config = {
        **({"proxy": f"http://127.0.0.1:{made.line.port}"} if proxied else {}),
        "reconnect_max_s": 1.0,
        "data": {"kind": "npz", "path": str(data), "class_names": list(class_names)},
        "compute": {"device": "cpu", "threads": 1},
        "policy": {"share_class_metrics": True},
        **({"metrics": {"port": made.metrics_ports[site]}} if site in made.metrics_ports else {}),
    }
    (made.site_home(site) / "agent.toml").write_text(to_toml(config), encoding="utf-8")


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a site's npz."""
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def _words(program: str, arguments: Sequence[str]) -> list[str]:
    module = {"fedctl": "fedctl.app"}.get(program, f"{program}.cli")
    return [sys.executable, "-m", module, *arguments]
