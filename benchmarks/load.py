"""One real coordinator and many light agents: one JSON object on stdout.

`fedserver serve` (mutual TLS, SQLite, its compute process) serves `--agents` sites, each with a certificate and a
connection of its own, from a few asyncio processes (load_agents.py). They run rounds of the `noop` model; between two
rounds a bare asyncio gRPC echo sends a message of a directive's size down as many streams over the same TLS, to the same
processes. Then a `fedimpres` run keeps the compute process at work while an operator pings every agent once.

control     EvaluateTask to all sites at once, answered at once: from the merge's end, in the journal, to the arrival of each
            answer. The commit that makes the merge durable lies in between.
bare        the echo: from the first write to the arrival of each answer
ping        `fedctl site ping`, as the coordinator measures it; ping_call is what the operator waits, with the audit's commit
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import resource
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from load_agents import Member, write_members
from round import PLAN, children, file_system, hardware, peak_rss_mb

from fedcore.channel import open_channel
from fedcore.credential import join_address
from fedcore.database import open_database
from fedcore.errors import CallTimeoutError
from fedcore.identity import Subject
from fedcore.pki import new_key
from fedcore.v1 import admin_pb2, federation_pb2, sites_pb2, sites_pb2_grpc
from fedctl.admin import Admin, list_records
from fedctl.demo_federation import HOST, LocalFederation, open_operator, start_coordinator
from fedctl.demo_processes import ProcessGroup, free_ports
from fedserver.authority import load_authority
from fedserver.certificates import Certificates
from fedserver.config import ServerHome
from fedserver.registry import enrol, utc_now
from fedserver.schema import MIGRATIONS

# How long anything may take that waits for all agents.
PATIENCE_S = 600.0
# After the last agent came, before memory is read.
SETTLE_S = 3.0
# Descriptors beside the agents' own.
SPARE_DESCRIPTORS = 200

# Beside a plan: a thousand sites take their time.
LIMITS = """
[limits]
stall_timeout_s = 600
"""
# Impressions as many and as slow as the pings need; the run is aborted then.
SYNTHESIS = """
name = "synthesis"
rounds = 1
min_sites = {agents}
strategy = "fedimpres"
strategy_options = {{ overlap = false, steps = 10000 }}
[model]
name = "cnn"
classes = 2
input = [1, 8, 8]
options = {{ width = 4 }}
[synthesis]
warmup_rounds = 0
images = 256
"""


def main() -> None:
    """Run the benchmark as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--agents", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--params", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=2, help="among which the agents are divided")
    parser.add_argument(
        "--ping-s", type=float, default=30.0, help="in which every agent is pinged once; 0: none"
    )
    parser.add_argument("--home", type=Path, default=Path(".bench"), help="folder on a real disk")
    arguments = parser.parse_args()
    raise_descriptors(2 * arguments.agents + SPARE_DESCRIPTORS)
    arguments.home.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="load-", dir=arguments.home.resolve()))
    try:
        print(json.dumps(measure(root, arguments)))
    finally:
        shutil.rmtree(root, ignore_errors=True)


def raise_descriptors(needed: int) -> None:
    """Raise this process's limit of descriptors, which the others inherit. Ends the program if the system allows less."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SystemExit(
            f"{needed} descriptors are needed, the hard limit is {hard}: raise it with ulimit -Hn"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))


def measure(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the federation, the bare echo and the pings."""
    agents, rounds = arguments.agents, arguments.rounds
    federation = LocalFederation.plan(root, "load")
    with ProcessGroup(root, {**os.environ, "OMP_NUM_THREADS": "1"}) as group, ExitStack() as stack:
        start_coordinator(federation, group, prepare=lambda: enrol_members(federation, agents))
        echo_port = free_ports(1)[0]
        echo = stack.enter_context(
            program("echo_server.py", federation.server_home / "credential", echo_port)
        )
        bounds = [agents * k // arguments.processes for k in range(arguments.processes + 1)]
        workers = [
            stack.enter_context(
                program("load_agents.py", root / "members.json", first, last - first, f"{HOST}:{echo_port}")
            )
            for first, last in itertools.pairwise(bounds)
            if last > first
        ]
        admin = stack.enter_context(open_operator(federation))
        admin.call(lambda s: s.ListRuns, admin_pb2.ListRunsRequest())
        coordinator = group.pid("coordinator")
        rss_before = rss_bytes(coordinator)
        connect_s = timed(lambda: tell(workers, "connect"))
        time.sleep(SETTLE_S)
        rss_idle = rss_bytes(coordinator)
        tell(workers, "echo")
        run, echoes = run_rounds(admin, echo, arguments)
        control = control_latencies(federation, run)
        records = list_records(admin, run)
        pings, ping_calls = (
            asyncio.run(pings_beside_synthesis(federation, admin, arguments))
            if arguments.ping_s
            else ([], [])
        )
        sockets = sum(map(sockets_to(federation.port).__contains__, inodes(workers)))
        peak_mb = peak_rss_mb(coordinator)
        compute_mb = sum(map(peak_rss_mb, children(coordinator)))
        group.check()
        told = tell(workers, "end")
    seconds = [record["seconds"] for record in records[1:] or records]
    missing = [f"round {r['round']}: {site}: {why}" for r in records for site, why in r["missing"].items()]
    lost = [*missing, *(reason for answer in told for reason in answer["lost"])]
    ratios = [c / b for c, b in zip(control, echoes, strict=True)]
    return {
        "benchmark": "load",
        "agents": agents,
        "rounds": len(records),
        "lost": len(lost) + agents * (rounds - len(records)),
        "sockets": sockets,
        "round_s": round(statistics.median(seconds), 3),
        "control_p99_ms": milliseconds(statistics.median(control)),
        "bare_p99_ms": milliseconds(statistics.median(echoes)),
        "ping_p99_ms": milliseconds(p99(pings)),
        "rss_mb": round(peak_mb, 1),
        "bytes_per_idle_agent": round((rss_idle - rss_before) / agents),
        "control_to_bare": round(statistics.median(ratios), 2),
        "ping_p50_ms": milliseconds(statistics.median(pings)) if pings else None,
        "ping_call_p99_ms": milliseconds(p99(ping_calls)),
        "phases_s": {
            phase: round(statistics.median(record["phases_s"][phase] for record in records[1:] or records), 3)
            for phase in ("training", "aggregating", "evaluating")
        },
        "connect_s": round(connect_s, 1),
        "compute_rss_mb": round(compute_mb, 1),
        "delivered": sum(answer["delivered"] for answer in told),
        "asked_again": sum(answer["asked_again"] for answer in told),
        "lost_first": lost[:5],
        "params": arguments.params,
        "processes": len(workers),
        "load_average": round(os.getloadavg()[0], 1),
        "file_system": file_system(root.parent),
        "hardware": hardware(),
    }


def enrol_members(federation: LocalFederation, count: int) -> None:
    """Enrol sites and issue their certificates by the coordinator's own code, before it serves: a commit for all."""
    home = ServerHome(federation.server_home)
    authority = load_authority(home.pki, federation.name, {})
    database = open_database(home.database, MIGRATIONS)

    async def issue() -> list[Member]:
        certificates = Certificates(database, lambda: authority)
        names, keys = [f"site-{k + 1:04d}" for k in range(count)], [new_key() for _ in range(count)]
        await asyncio.gather(*(database.write(lambda c, n=n: enrol(c, n, utc_now())) for n in names))  # type: ignore[misc]
        subjects = [Subject(federation.name, "site", name) for name in names]
        chains = await asyncio.gather(
            *(certificates.issue(s, k.public_key()) for s, k in zip(subjects, keys, strict=True))
        )
        return list(zip(keys, chains, strict=True))

    try:
        members = asyncio.run(issue())
    finally:
        database.close()
    write_members(
        federation.root / "members.json", join_address(HOST, federation.port), authority.roots_pem, members
    )


@contextmanager
def program(name: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    """A program of this folder that takes commands on stdin; it is ended in the end."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name(name)), *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def tell(processes: Sequence["subprocess.Popen[str]"], command: str) -> list[Any]:
    """Give a command to all, and wait for all their answers."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(command + "\n")
        process.stdin.flush()
    answers = []
    for process in processes:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of light agents or the echo server died at '{command}'")
        answers.append(json.loads(line))
    return answers


def run_rounds(
    admin: Admin, echo: "subprocess.Popen[str]", arguments: argparse.Namespace
) -> tuple[str, list[float]]:
    """The rounds, and a bare echo before each: the run, and the echoes' p99 in seconds."""
    plan = PLAN.format(sites=arguments.agents, rounds=arguments.rounds, params=arguments.params) + LIMITS
    run = admin.call(lambda s: s.SubmitRun, admin_pb2.SubmitRunRequest(plan_toml=plan)).run
    wait_for(admin, run, lambda m: m.state != "QUEUED")
    control = admin_pb2.ControlRunRequest(run=run)
    admin.call(lambda s: s.PauseRun, control)  # its first model is still to be built
    wait_for(admin, run, lambda m: m.state == "PAUSED")
    echoes: list[float] = []
    size = len(directive(plan, run).SerializeToString())
    for number in range(1, arguments.rounds + 1):
        echoes.append(p99(tell([echo], str(size))[0]))
        admin.call(lambda s: s.ResumeRun, control)  # all sites are there: the round opens with it
        if number < arguments.rounds:
            with contextlib.suppress(CallTimeoutError):  # it is taken up later
                admin.call(lambda s: s.PauseRun, control)
        message = wait_for(admin, run, lambda m: m.state in ("PAUSED", "DONE"))
        if message.round != number:
            raise SystemExit(f"round {number} did not open: {message.reason[:500]}")
    return run, echoes


def directive(plan: str, run: str) -> federation_pb2.Directive:
    """A directive as long as those that the run sends."""
    from fedcore.plan import parse_plan
    from fedcore.v1 import tensor_pb2

    task = federation_pb2.EvaluateTask(run=run, round=1, plan_json=parse_plan(plan).to_site_json())
    task.model.CopyFrom(tensor_pb2.ArtifactRef(digest="0" * 64, payload_bytes=4000))
    return federation_pb2.Directive(evaluate=task)


def wait_for(admin: Admin, run: str, reached: Any) -> admin_pb2.Run:
    """Ask for the run, a few times a second, until `reached` holds for it."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            message = admin.call(lambda s: s.GetRun, admin_pb2.GetRunRequest(run=run))
        except CallTimeoutError:  # a coordinator with a thousand calls before ours
            continue
        if reached(message):
            return message
        if message.state in ("FAILED", "DEGRADED", "ABORTED") or time.monotonic() > deadline:
            raise SystemExit(f"run {run}: {message.state}, {message.phase}: {message.reason[:500]}")
        time.sleep(0.3)


def control_latencies(federation: LocalFederation, run: str) -> list[float]:
    """A round each: p99 over the sites of the seconds from the merge's end to the arrival of their figures."""
    uri = f"{ServerHome(federation.server_home).database.absolute().as_uri()}?mode=ro"
    query = "SELECT body FROM journal WHERE run = ? AND kind IN (?, ?) ORDER BY seq"
    with closing(sqlite3.connect(uri, uri=True)) as connection:
        rows = connection.execute(query, (run, "aggregation_finished", "evaluation_reported")).fetchall()
    merged: dict[int, float] = {}
    answers: dict[int, list[float]] = {}
    for (body,) in rows:
        event = json.loads(body)
        if event["kind"] == "aggregation_finished":
            merged[event["round"]] = event["at"]
        else:
            answers.setdefault(event["round"], []).append(event["at"] - merged[event["round"]])
    return [p99(answers[number]) for number in sorted(answers)]


async def pings_beside_synthesis(
    federation: LocalFederation, admin: Admin, arguments: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Ping every agent once while impressions are made: round trips, and how long the operator's calls took, in seconds."""
    plan = SYNTHESIS.format(agents=arguments.agents) + LIMITS
    run = admin.call(lambda s: s.SubmitRun, admin_pb2.SubmitRunRequest(plan_toml=plan)).run
    wait_for(admin, run, lambda m: m.phase == "synthesising" and m.reason.startswith("synthes"))
    round_trips, calls = [], []

    async def ping(stub: Any, site: str, after_s: float) -> None:
        await asyncio.sleep(after_s)
        began = time.perf_counter()
        reply = await stub.PingSite(sites_pb2.PingSiteRequest(site=site))
        calls.append(time.perf_counter() - began)
        round_trips.append(reply.round_trip_s)

    async with open_channel(federation.operator) as channel:
        stub = sites_pb2_grpc.SitesStub(channel)
        names = [f"site-{k + 1:04d}" for k in range(arguments.agents)]
        await ping(stub, names[0], 0.0)  # opens the connection
        round_trips.clear()
        calls.clear()
        every_s = arguments.ping_s / arguments.agents
        await asyncio.gather(*(ping(stub, name, k * every_s) for k, name in enumerate(names)))
    message = admin.call(lambda s: s.GetRun, admin_pb2.GetRunRequest(run=run))
    if message.phase != "synthesising":
        raise SystemExit(
            f"synthesis ended before the pings: {message.state}, {message.phase}: {message.reason}"
        )
    admin.call(lambda s: s.AbortRun, admin_pb2.ControlRunRequest(run=run))
    return round_trips, calls


def sockets_to(port: int) -> set[str]:
    """Inodes of the established connections to a port."""
    lines = [
        line for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    rows = [line.split() for line in lines]
    return {row[9] for row in rows if row[3] == "01" and int(row[2].rpartition(":")[2], 16) == port}


def inodes(processes: Iterable["subprocess.Popen[str]"]) -> Iterator[str]:
    """Inodes of all sockets that the processes have open."""
    for process in processes:
        for path in Path(f"/proc/{process.pid}/fd").iterdir():
            target = str(path.readlink())
            if target.startswith("socket:["):
                yield target[len("socket:[") : -1]


def rss_bytes(pid: int) -> int:
    """Resident memory of a process now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def p99(values: Sequence[float]) -> float:
    """The 99th percentile: of a hundred values, the second largest. NaN if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] if ordered else float("nan")


def timed(work: Any) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def milliseconds(seconds: float) -> float | None:
    """Rounded; None for NaN, which JSON has not."""
    return None if math.isnan(seconds) else round(seconds * 1000, 1)


if __name__ == "__main__":
    main()
