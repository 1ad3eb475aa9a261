"""A federation of this machine: a real coordinator and real agents as processes, over mutual TLS."""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from fedcore.errors import CallTimeoutError
from fedctl.admin import Admin, open_credential
from fedctl.demo_plan import to_toml
from fedctl.demo_processes import ProcessGroup, free_ports
from fedctl.durations import format_duration

JOIN_TIMEOUT_S = 120.0
HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class DemoSite:
    """A site of the demo: its name and its data file (npz)."""

    name: str
    data: Path


@dataclass(frozen=True, slots=True)
class LocalFederation:
    """Folders and ports of a federation that lives in `root`."""

    root: Path
    name: str
    port: int
    enroll_port: int

    @classmethod
    def plan(cls, root: Path, name: str) -> "LocalFederation":
        """Choose ports for a federation in `root`."""
        port, enroll_port = free_ports(2)
        return cls(root, name, port, enroll_port)

    @property
    def server_home(self) -> Path:
        """The coordinator's home."""
        return self.root / "coordinator"

    @property
    def operator(self) -> Path:
        """The first operator's credential folder."""
        return self.server_home / "operator"

    def site_home(self, site: str) -> Path:
        """An agent's home."""
        return self.root / "sites" / site


def start_coordinator(
    federation: LocalFederation, group: ProcessGroup, prepare: Callable[[], None] = lambda: None
) -> None:
    """`fedserver init`, `prepare` for who wants to find things in the new home, and `fedserver serve`; returns when it
    listens. Raises ComputeError, UnreachableError.
    """
    init = ["init", "--home", str(federation.server_home), "--name", federation.name, "--host", HOST]
    init += ["--port", str(federation.port), "--enroll-port", str(federation.enroll_port)]
    group.run("coordinator", _program("fedserver", init))
    config = {
        "name": federation.name,
        "host": HOST,
        "port": federation.port,
        "enroll_port": federation.enroll_port,
        # Nothing of a demo is for the neighbours.
        "listen": HOST,
        "heartbeat_interval_s": 2.0,
        "compute": {"threads": 1},
    }
    (federation.server_home / "fedserver.toml").write_text(to_toml(config), encoding="utf-8")
    prepare()
    serve = ["serve", "--home", str(federation.server_home), "--lifeline", "{lifeline}"]
    group.start("coordinator", _program("fedserver", serve))
    group.wait_for_port("coordinator", federation.port)


def start_agents(
    federation: LocalFederation,
    group: ProcessGroup,
    admin: Admin,
    sites: Sequence[DemoSite],
    class_names: Sequence[str],
) -> None:
    """`fedagent enroll` and `fedagent serve` for each site. Raises ComputeError, and what the coordinator
    answers.
    """
    failures: list[BaseException] = []

    def enrol(site: DemoSite, command: list[str]) -> None:
        try:
            group.run(site.name, command)
        except BaseException as error:
            failures.append(error)

    threads = []
    for site in sites:
        home = federation.site_home(site.name)
        home.mkdir(parents=True, mode=0o700)
        _write_agent_config(home, site, class_names)
        command = _program("fedagent", ["enroll", "--home", str(home), *_token_options(admin, site.name)])
        threads.append(
            threading.Thread(target=enrol, args=(site, command), name=f"enrol {site.name}", daemon=True)
        )
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    for site in sites:
        serve = ["serve", "--home", str(federation.site_home(site.name)), "--lifeline", "{lifeline}"]
        group.start(site.name, _program("fedagent", serve))


def wait_for_sites(admin: Admin, group: ProcessGroup, sites: Sequence[DemoSite]) -> None:
    """Wait until all sites are connected. Raises ComputeError if a program dies, CallTimeoutError."""
    from fedcore.v1 import admin_pb2

    deadline = time.monotonic() + JOIN_TIMEOUT_S
    missing = {site.name for site in sites}
    while missing:
        group.check()
        if time.monotonic() > deadline:
            raise CallTimeoutError(
                f"{', '.join(sorted(missing))}: not connected after {format_duration(JOIN_TIMEOUT_S)}",
                hint="see their logs in the demo's folder",
            )
        reply = admin.call(lambda stub: stub.ListSites, admin_pb2.ListSitesRequest())
        missing -= {site.id for site in reply.sites if site.connected}
        time.sleep(0.1)


def open_operator(federation: LocalFederation) -> AbstractContextManager[Admin]:
    """Connect as the federation's first operator."""
    return open_credential(federation.operator)


def _program(name: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", f"{name}.cli", *arguments]


def _token_options(admin: Admin, site: str) -> list[str]:
    from fedcore.v1 import admin_pb2

    reply = admin.call(lambda stub: stub.CreateToken, admin_pb2.CreateTokenRequest(site=site, ttl_s=600))
    return [
        "--coordinator",
        reply.coordinator,
        "--token",
        reply.token,
        "--ca-fingerprint",
        reply.ca_fingerprint,
    ]


def _write_agent_config(home: Path, site: DemoSite, class_names: Sequence[str]) -> None:
    config = {
        "reconnect_max_s": 2.0,
        "data": {"kind": "npz", "path": str(site.data), "class_names": list(class_names)},
        "compute": {"threads": 1},
        # The demo's sites share one public test set, so their histograms are no secret.
        "policy": {"share_class_metrics": True},
    }
    (home / "agent.toml").write_text(to_toml(config), encoding="utf-8")
