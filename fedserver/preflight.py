"""`fedserver preflight`: what must be right on this machine before `serve`, one check a line. Changes nothing."""

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from fedcore.compute_host import ComputeHost
from fedcore.errors import FedimpresError
from fedcore.finding import Finding, bad, good, worrying
from fedcore.plan import validate_plan
from fedserver.checks import check_home, load_home
from fedserver.config import ServerConfig, ServerHome
from fedserver.health_facts import disk_fact

# Small, and of a real architecture: a first model of it shows that PyTorch computes here.
_PLAN = {
    "name": "preflight",
    "rounds": 1,
    "strategy": "fedavg",
    "model": {"name": "cnn", "classes": 2, "input": [1, 8, 8]},
}


def preflight(home: Path, now: datetime) -> Iterator[Finding]:
    """Configuration, certificates, database, name, ports, disk, device. Raises ConfigError if `home` is none."""
    config = load_home(home)
    yield from check_files(home, now)
    yield check_name(config.host)
    for what, port in (("port", config.port), ("enrolment", config.enroll_port)):
        yield check_port(what, config.listen, port)
    yield check_disk(ServerHome(home).artifacts, home)
    yield check_device(config)


def check_files(home: Path, now: datetime) -> Iterator[Finding]:
    """What `check-config` looks at."""
    try:
        for line in check_home(home, now):
            verdict, _, text = line.partition(" ")
            found = text.strip()
            yield good("home", found) if verdict == "ok" else worrying("home", found, "see docs/runbooks")
    except FedimpresError as error:
        yield bad("home", error.message, error.hint or "see fedserver check-config")


def check_name(host: str) -> Finding:
    """Whether the name that sites dial has an address."""
    try:
        addresses = sorted(
            {str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
        )
    except OSError as error:
        return worrying("name", f"{host}: {error.strerror}", "sites must be able to resolve it: see your DNS")
    return good("name", f"{host} is {', '.join(addresses)}")


def check_port(what: str, listen: str, port: int) -> Finding:
    """Whether `serve` can listen there."""
    address = listen.strip("[]")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
    except OSError as error:
        hint = "does the coordinator serve already? else change port or listen in fedserver.toml"
        return bad(what, f"{listen}:{port}: {error.strerror}", hint)
    return good(what, f"{listen}:{port} is free")


def check_disk(artifacts: Path, home: Path) -> Finding:
    """Room for models and updates, and leave to write them."""
    place = artifacts if artifacts.is_dir() else home
    if not os.access(place, os.W_OK):
        return bad("disk", f"{place} can't be written by this user", "run as the service's user, or chown it")
    fact = disk_fact(shutil.disk_usage(place))
    return good("disk", fact.says) if fact.healthy else bad("disk", fact.says, fact.hint)


def check_device(config: ServerConfig) -> Finding:
    """Whether the compute process starts and PyTorch computes on the device that is configured."""
    try:
        asyncio.run(_first_model(config))
    except FedimpresError as error:
        return bad("device", error.message, error.hint or "see [compute] in fedserver.toml")
    return good("device", f"{config.compute.device}: PyTorch made a first model")


async def _first_model(config: ServerConfig) -> None:
    host = ComputeHost("fedserver.compute")
    with tempfile.TemporaryDirectory() as folder:
        args = {
            "plan": validate_plan(_PLAN).to_json(),
            "initial": None,
            "out": str(Path(folder) / "model"),
            "compute": config.compute.model_dump(),
        }
        try:
            await host.run("initialise", args)
        finally:
            await host.close()
