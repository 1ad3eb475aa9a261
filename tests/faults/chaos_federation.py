"""A standing federation for chaos: three agents, each behind a relay of its own, every program in a world of its own (its
wall clock, what is durable of its files: `preload/world.c`).
"""

import json
import os
import resource
import shutil
import sqlite3
import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedctl.demo_plan import to_toml
from fedctl.demo_processes import free_ports
from tests.faults.power_cut import Durable
from tests.faults.relay import Relay
from tests.federation_fixture import (
    CLASSES,
    Federation,
    children,
    digits_plan,
    noop_plan,
    wait_until,
    write_digits,
)

SITES = ("site-a", "site-b", "site-c")
# Updates are held, cut and sent again after so many of their four pieces.
PARAMS = 2 << 20
PIECE_BYTES = 2 << 20
ROUNDS = 2
_PRELOAD = Path(__file__).parent / "preload"
_ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("cc")


def compile_world(folder: Path) -> Path:
    """The library of `preload/world.c`, in a folder; made there the first time. Needs COMPILER."""
    library = folder / "world.so"
    if not library.exists():
        source = str(_PRELOAD / "world.c")
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), source, "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
    return library


def upload_document(**changes: Any) -> dict[str, Any]:
    """Updates of four pieces, without training; only the best and the last model are kept."""
    return noop_plan(PARAMS, SITES, rounds=ROUNDS, keep_models=1, **_patient(changes))


def impressions_document(**changes: Any) -> dict[str, Any]:
    """A small net over the digits, with impressions made beside the second round's training."""
    synthesis = {"warmup_rounds": 1, "images": 10}
    return digits_plan(
        SITES,
        name="impressions",
        strategy="fedimpres",
        rounds=ROUNDS,
        synthesis=synthesis,
        **_patient(changes),
    )


def recalibrated_document(**changes: Any) -> dict[str, Any]:
    """The same net, with BatchNorm statistics measured after each merge; every site's are wanted."""
    return digits_plan(
        SITES, name="recalibrated", rounds=ROUNDS, strategy_options={"recalibrate": True}, **_patient(changes)
    )


def _patient(changes: dict[str, Any]) -> dict[str, Any]:
    """Sites are waited for, unless `changes` say otherwise."""
    return {**changes, "limits": {"join_wait_s": 60, **changes.get("limits", {})}}


@dataclass
class ChaosFederation(Federation):
    """Agents dial their relay; a program's wall clock is the machine's, moved by `set_clock`."""

    relays: dict[str, Relay] = field(default_factory=dict)
    # The name of the guard that is broken in its programs; see `mutants`.
    mutant: str = ""
    _starting: str = ""
    _durable: dict[str, Durable] = field(default_factory=dict)

    def start(self, name: str, program: str, *arguments: str) -> None:
        self._starting = name
        self._durable[name] = Durable(self.root / name, self._synced(name))
        try:
            super().start(name, program, *arguments)
        finally:
            self._starting = ""

    def environment(self) -> dict[str, str]:
        temporary = self.root / "temporary"
        temporary.mkdir(exist_ok=True)
        plain = {**super().environment(), "TMPDIR": str(temporary)}
        name = self._starting
        if not name:
            return plain
        plain["PYTHONPATH"] = os.pathsep.join(
            filter(None, (str(_PRELOAD), str(_ROOT), plain.get("PYTHONPATH", "")))
        )
        if self.mutant:
            plain["CHAOS_MUTANT"] = self.mutant
        if COMPILER is not None:
            plain["LD_PRELOAD"] = str(compile_world(self.root))
            plain["WORLD_CLOCK"] = str(self._clock(name))
            plain["WORLD_SYNCED"] = str(self._synced(name))
        return plain

    def _clock(self, name: str) -> Path:
        """The file that holds by how many seconds a program's wall clock is off."""
        path = self.root / f"{name}.clock"
        if not path.exists():
            path.write_bytes(struct.pack("=q", 0))
        return path

    def set_clock(self, name: str, seconds: int) -> None:
        with self._clock(name).open("r+b") as file:
            file.write(struct.pack("=q", seconds))

    def _synced(self, name: str) -> Path:
        return self.root / f"{name}.synced"

    def cut_power(self, name: str) -> list[str]:
        """Kill a program and its compute process, and take away what of its files was not durable. Returns which files
        became shorter.
        """
        self.kill_with_compute(name)
        return self._durable[name].cut_power()

    def enrol(self, site: str) -> None:
        from fedagent.enroll import enroll
        from fedcore.v1 import admin_pb2

        relay = self.relays[site] = Relay(self.port)
        with self.admin() as admin:
            token = admin.call(
                lambda stub: stub.CreateToken, admin_pb2.CreateTokenRequest(site=site, ttl_s=900)
            )
        enroll(
            self.site_home(site),
            coordinator=f"127.0.0.1:{relay.port}",
            token=token.token,
            ca_fingerprint=token.ca_fingerprint,
        )

    def stop(self) -> None:
        for relay in self.relays.values():
            relay.heal()
        super().stop()
        for relay in self.relays.values():
            relay.close()

    # -- what is asked often --------------------------------------------------------------------

    def events(self, run: str, kind: str) -> list[dict[str, Any]]:
        """Bodies of a run's events of one kind, as they are on the disk."""
        uri = f"file:{self.server_home / 'fedserver.db'}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as database:
            query = "SELECT body FROM journal WHERE run = ? AND kind = ? ORDER BY seq"
            return [json.loads(body) for (body,) in database.execute(query, (run, kind))]

    def submitted(self, run: str) -> list[str]:
        """The run's plan, as JSON."""
        uri = f"file:{self.server_home / 'fedserver.db'}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as database:
            return [text for (text,) in database.execute("SELECT plan_json FROM runs WHERE run = ?", (run,))]

    def stored(self, run: str, round_number: int) -> list[str]:
        """The sites whose updates of a round are stored."""
        return [e["site"] for e in self.events(run, "update_stored") if e["round"] == round_number]

    def measured(self, run: str, round_number: int) -> dict[str, str]:
        """The digests of the statistics that are stored of a round, by site."""
        stored = self.events(run, "statistics_stored")
        return {e["site"]: e["digest"] for e in stored if e["round"] == round_number}

    def control(self, method: str, run: str) -> None:
        """PauseRun or ResumeRun."""
        from fedcore.v1 import admin_pb2

        request = admin_pb2.ControlRunRequest(run=run, reason="chaos")
        with self.admin() as admin:
            admin.call(lambda stub: getattr(stub, method), request)

    def wait_away(self, site: str) -> None:
        """Until the coordinator has noticed that a site's connection is gone."""
        from fedcore.v1 import admin_pb2

        with self.admin() as admin:

            def away() -> bool:
                reply = admin.call(lambda stub: stub.ListSites, admin_pb2.ListSitesRequest())
                return site not in {one.id for one in reply.sites if one.connected}

            wait_until(away, f"{site} is away")

    def pid(self, who: str) -> int:
        """Of "coordinator", "compute" (the coordinator's), a site's agent or "SITE compute"."""
        if who == "compute":
            return self.compute_pid("coordinator")
        name, _, compute = who.partition(" ")
        return self.compute_pid(name) if compute else self.programs[name].pid

    @contextmanager
    def file_limit(self, who: str, limit_bytes: int) -> Iterator[None]:
        """No file of a process grows beyond this: writes end short, or fail, as on a full disk."""
        pid = self.pid(who)
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
        try:
            yield
        finally:
            if Path(f"/proc/{pid}").exists():
                resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    # -- what must not grow ---------------------------------------------------------------------

    def left_files(self) -> list[str]:
        """Files that no finished run needs: half-arrived, temporary, results not delivered."""
        homes = {"coordinator": ("spool/*", "artifacts/tmp/*"), "temporary": ("*",)}
        homes |= dict.fromkeys(SITES, ("artifacts/tmp/*", "artifacts/partial/*", "tasks/*"))
        return [
            str(path.relative_to(self.root))
            for home, patterns in homes.items()
            for pattern in patterns
            for path in (self.root / home).glob(pattern)
        ]

    def strays(self) -> list[str]:
        """Processes that are neither a program nor the one compute process of a program."""
        expected = set()
        for program in self.programs.values():
            expected |= {program.pid, *children(program.pid)[:1]}
        return [line for line in self.leftovers() if int(line.split()[0]) not in expected]

    def held_resources(self) -> Counter[str]:
        """Open descriptors and threads of each control process."""
        found: Counter[str] = Counter()
        for name, program in self.programs.items():
            found[f"{name} descriptors"] = len(os.listdir(f"/proc/{program.pid}/fd"))
            found[f"{name} threads"] = len(os.listdir(f"/proc/{program.pid}/task"))
        return found


Made = TypeVar("Made", bound=ChaosFederation)


def build(root: Path, mutant: str = "") -> ChaosFederation:
    """Coordinator and agents, connected."""
    return set_up(ChaosFederation(root, *free_ports(2), mutant=mutant), heartbeat_s=0.5)


def set_up(made: Made, *, heartbeat_s: float) -> Made:
    """Coordinator and agents of a new federation, connected. What it began is stopped if that fails."""
    try:
        home = ("--home", str(made.server_home), "--name", "lab", "--host", "127.0.0.1")
        said = made.command(
            "fedserver", "init", *home, "--port", str(made.port), "--enroll-port", str(made.enroll_port)
        )
        assert said.code == 0, said
        config = made.server_home / "fedserver.toml"
        config.write_text(
            config.read_text() + f"\nheartbeat_interval_s = {heartbeat_s}\n[compute]\nthreads = 1\n"
        )
        made.start_coordinator()
        for site in SITES:
            made.enrol(site)
        write_digits(made, SITES)
        for site in SITES:
            settings = {
                "reconnect_max_s": 0.5,
                "data": {"kind": "npz", "path": str(made.data(site)), "class_names": list(CLASSES)},
                "compute": {"device": "cpu", "threads": 1},
            }
            (made.site_home(site) / "agent.toml").write_text(to_toml(settings), encoding="utf-8")
            made.start_agent(site)
        made.wait_connected(*SITES)
    except BaseException:
        made.stop()
        raise
    return made
