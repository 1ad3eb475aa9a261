"""What a round costs, beside what the wire costs: one JSON object on stdout.

A real coordinator and real agents (`fedserver serve`, `fedagent serve`: processes, mutual TLS, homes on disk) run
rounds of the `noop` model, which trains nothing but makes every site's update a new file. Before each round as many
bare gRPC clients as there are sites stream the same bytes down and up through a bare server (sync API, mutual TLS,
chunks of the same size, no disk, no digest). The rounds are held apart by pausing the run.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.v1 import admin_pb2
from fedctl.admin import Admin, list_records
from fedctl.demo_federation import (
    DemoSite,
    LocalFederation,
    open_operator,
    start_agents,
    start_coordinator,
    wait_for_sites,
)
from fedctl.demo_processes import ProcessGroup, free_ports

MODEL_BYTES_PER_PARAM = 4
# A round of 16 sites with 400 MB models moves 13 GB.
ROUND_S = 900.0
PLAN = """
name = "bench"
rounds = {rounds}
min_sites = {sites}
strategy = "fedavg"
[model]
name = "noop"
classes = 2
input = [1, 8, 8]
options = {{ params = {params} }}
"""


def main() -> None:
    """Run the benchmark as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--params", type=int, default=11_700_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--home", type=Path, default=Path(".bench"), help="folder on a real disk")
    arguments = parser.parse_args()
    arguments.home.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="round-", dir=arguments.home.resolve()))
    if file_system(root) == "tmpfs":
        raise SystemExit(f"{root} is on tmpfs; name a folder on a disk with --home")
    try:
        print(json.dumps(measure(root, arguments.sites, arguments.params, arguments.rounds)))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def measure(root: Path, sites: int, params: int, rounds: int) -> dict[str, Any]:
    """Run the federation and the bare streams in turn."""
    federation = LocalFederation.plan(root, "bench")
    data = root / "data.npz"
    # A site must have images to be taken in; `noop` never looks at them.
    np.savez(data, train_images=np.zeros((20, 8, 8), np.uint8), train_labels=np.arange(20).reshape(-1, 1) % 2)
    demo_sites = [DemoSite(f"site-{k + 1:02d}", data) for k in range(sites)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    bare_s: list[float] = []
    with ProcessGroup(root, environment) as group:
        start_coordinator(federation, group)
        with open_operator(federation) as admin:
            start_agents(federation, group, admin, demo_sites, ["a", "b"])
            wait_for_sites(admin, group, demo_sites)
            run = submit(admin, sites, params, rounds + 1)
            bare = BareStreams(federation.operator, sites, params * MODEL_BYTES_PER_PARAM)
            try:
                for number in range(rounds + 1):
                    bare_s.append(bare.measure())
                    if number == 1:
                        cpu_before = cpu_seconds(group, demo_sites)
                    one_round(admin, run, group)
            finally:
                bare.close()
            cpu_after = cpu_seconds(group, demo_sites)
            records = list_records(admin, run)
            peaks_mb = [
                peak_rss_mb(pid) for pid in (group.pid("coordinator"), *children(group.pid("coordinator")))
            ]
            syncs = syncs_per_round(root / "coordinator.log", run)
    # The first of each warms caches and starts the compute processes.
    seconds = [record["seconds"] for record in records[1:]]
    bare_s = bare_s[1:]
    return {
        "benchmark": "round",
        "sites": sites,
        "params": params,
        "rounds": len(seconds),
        "round_s": {"median": statistics.median(seconds), "all": [round(s, 4) for s in seconds]},
        "bare_stream_s": {"median": statistics.median(bare_s), "all": [round(s, 4) for s in bare_s]},
        "ratio_to_bare": round(statistics.median(bare_s) / statistics.median(seconds), 3),
        "phases_s": {
            phase: round(statistics.median(r["phases_s"].get(phase, 0.0) for r in records[1:]), 4)
            for phase in ("training", "aggregating", "evaluating")
        },
        "bytes_up": records[-1]["bytes_up"],
        "bytes_down": records[-1]["bytes_down"],
        "coordinator_peak_rss_mb": round(sum(peaks_mb), 1),
        "coordinator_peak_rss_mb_by_process": [round(peak, 1) for peak in peaks_mb],
        "cpu_s_per_round": {who: round((cpu_after[who] - cpu_before[who]) / rounds, 3) for who in cpu_after},
        "fsyncs_per_round": syncs,
        "file_system": file_system(root),
        "hardware": hardware(),
    }


def submit(admin: Admin, sites: int, params: int, rounds: int) -> str:
    """Submit a noop run and pause it before its first round."""
    plan = PLAN.format(sites=sites, params=params, rounds=rounds)
    reply = admin.call(lambda s: s.SubmitRun, admin_pb2.SubmitRunRequest(plan_toml=plan))
    while admin.call(lambda s: s.GetRun, admin_pb2.GetRunRequest(run=reply.run)).state == "QUEUED":
        time.sleep(0.005)
    admin.call(lambda s: s.PauseRun, admin_pb2.ControlRunRequest(run=reply.run))
    wait_paused(admin, reply.run)
    return reply.run


def one_round(admin: Admin, run: str, group: ProcessGroup) -> None:
    """Let exactly one round happen: resume, and ask for the next pause while it is under way."""
    control = admin_pb2.ControlRunRequest(run=run)
    before = admin.call(lambda s: s.ResumeRun, control)
    deadline = time.monotonic() + ROUND_S
    while (state := admin.call(lambda s: s.GetRun, admin_pb2.GetRunRequest(run=run))).phase == "waiting":
        if time.monotonic() > deadline:
            raise SystemExit(f"the round did not open within {ROUND_S:.0f} s: {state.reason}")
        time.sleep(0.005)
    if before.round + 1 < before.rounds:
        admin.call(lambda s: s.PauseRun, control)
    group.check()
    wait_paused(admin, run)


def wait_paused(admin: Admin, run: str) -> None:
    """Wait until the run is paused or over."""
    deadline = time.monotonic() + ROUND_S
    while True:
        message = admin.call(lambda s: s.GetRun, admin_pb2.GetRunRequest(run=run))
        if message.state in ("PAUSED", "DONE"):
            return
        if message.state in ("FAILED", "DEGRADED", "ABORTED") or time.monotonic() > deadline:
            raise SystemExit(f"run {message.state}: {message.reason}")
        time.sleep(0.05)


class BareStreams:
    """A bare gRPC server and one client process a site; `measure` streams the bytes down, then up, all at once."""

    def __init__(self, credential: Path, clients: int, size: int) -> None:
        port = free_ports(1)[0]
        program = str(Path(__file__).with_name("bare_stream.py"))
        arguments = [str(credential.parent), str(port), str(size)]
        self._server = subprocess.Popen(
            [sys.executable, program, "server", *arguments], stdin=subprocess.PIPE
        )
        self._clients = [
            subprocess.Popen(
                [sys.executable, program, "client", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(clients)
        ]
        for client in self._clients:
            self._answer(client)

    def measure(self) -> float:
        """Seconds until all clients have received and sent their bytes."""
        began = time.perf_counter()
        for command in ("down", "up"):
            for client in self._clients:
                assert client.stdin is not None
                client.stdin.write(command + "\n")
                client.stdin.flush()
            for client in self._clients:
                self._answer(client)
        return time.perf_counter() - began

    def close(self) -> None:
        """End all processes."""
        for process in (*self._clients, self._server):
            process.kill()
            process.wait()

    def _answer(self, client: "subprocess.Popen[str]") -> None:
        assert client.stdout is not None
        if client.stdout.readline().strip() != "ok":
            raise SystemExit("a bare client failed")


def children(pid: int) -> list[int]:
    """The processes that a process started: its compute process."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cpu_seconds(group: ProcessGroup, sites: list[DemoSite]) -> dict[str, float]:
    """Processor time used so far by the four kinds of process."""
    agents = [group.pid(site.name) for site in sites]
    pids = {
        "coordinator_control": [group.pid("coordinator")],
        "coordinator_compute": children(group.pid("coordinator")),
        "agents_control": agents,
        "agents_compute": [child for agent in agents for child in children(agent)],
    }
    ticks = os.sysconf("SC_CLK_TCK")

    def used(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / ticks

    return {who: sum(map(used, members)) for who, members in pids.items()}


def peak_rss_mb(pid: int) -> float:
    """VmHWM of a process in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"process {pid} has no VmHWM")


def syncs_per_round(log: Path, run: str) -> float:
    """Waits for the disk (fsync, fdatasync, journal commits) from one round's end to the next, by the coordinator's log."""
    events = (json.loads(line) for line in log.read_text().splitlines() if line.startswith("{"))
    counts = [e["syncs_so_far"] for e in events if e.get("event") == "round finished" and e.get("run") == run]
    return statistics.median(after - before for before, after in itertools.pairwise(counts))


def file_system(path: Path) -> str:
    """Type of the file system that holds `path`."""
    return subprocess.run(
        ["stat", "--file-system", "--format=%T", str(path)], capture_output=True, text=True, check=True
    ).stdout.strip()


def hardware() -> str:
    """The processor and how many cores there are."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
