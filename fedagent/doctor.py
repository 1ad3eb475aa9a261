"""`fedagent doctor` and `fedagent preflight`: one check a line, from this machine out to the coordinator.

Each check is a function of its own that raises nothing for what it looks for: it returns what it found. Nothing is
changed here or there; the coordinator is asked for its health only.
"""

import asyncio
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from fedagent.config import AgentConfig, AgentHome
from fedagent.line import Line, check_dns, check_inspection, check_tcp, check_tls
from fedcore.channel import open_sync_channel
from fedcore.compute_host import ComputeHost
from fedcore.credential import Credential, split_address
from fedcore.errors import FedimpresError, NotFoundError
from fedcore.finding import Finding, bad, good, skipped, worrying
from fedcore.protocol import PROTOCOL, PROTOCOL_KEY, TIME_KEY, VERSION_KEY
from fedcore.status import from_rpc_error
from fedcore.text import printable
from fedcore.version import software_version

# isort: split
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_MB = 1_000_000
# A model, impressions and an update of a large network, twice.
_DISK_LOW_BYTES = 2_000 * _MB
_DISK_FULL_BYTES = 200 * _MB
_SHM_LOW_BYTES = 64 * _MB
_SKEW_WORRYING_S = 5.0
# Certificates are backdated by ten minutes: beyond that a clock behind refuses fresh ones.
_SKEW_BAD_S = 300.0
_CERTIFICATE_LOW = timedelta(days=8)
_PROBE_BYTES = 1 << 20
_SLOW_BYTES_PER_S = 125_000


@dataclass(frozen=True, slots=True)
class Answer:
    """What the coordinator said to a health check, and when: wall-clock seconds of this machine, before and after."""

    asked_at: float
    answered_at: float
    metadata: dict[str, str]

    @property
    def skew_s(self) -> float | None:
        """How far this machine's clock is ahead, seconds, as exact as half the round trip; None if untold."""
        try:
            theirs = float(self.metadata[TIME_KEY])
        except (KeyError, ValueError):
            return None
        return (self.asked_at + self.answered_at) / 2 - theirs


def preflight(
    home: AgentHome, config: AgentConfig, credential: Credential, now: datetime
) -> Iterator[Finding]:
    """What must be right before `serve`: disk, device, data, coordinator."""
    yield check_disk(home.root)
    yield from check_compute(config)
    yield check_certificate(credential, now)
    with _Coordinator(credential, config.proxy) as coordinator:
        _, reached = coordinator.reach()
        yield reached


def doctor(home: AgentHome, config: AgentConfig, credential: Credential, now: datetime) -> Iterator[Finding]:
    """Everything between this machine and a working site."""
    host, port = split_address(credential.coordinator)
    line = Line(host, port, config.proxy)
    yield check_dns(line)
    yield check_tcp(line)
    yield check_tls(line, home.credential)
    yield check_inspection(line, home.credential)
    yield check_certificate(credential, now)
    with _Coordinator(credential, config.proxy) as coordinator:
        answer, reached = coordinator.reach()
        yield reached
        yield check_clock(answer)
        yield check_protocol(answer)
        yield coordinator.measure() if answer else skipped("throughput", "the coordinator does not answer")
    yield from check_compute(config)
    yield check_shm(Path("/dev/shm"))  # noqa: S108 - it is looked at, nothing is put there
    yield check_disk(home.root)


def check_certificate(credential: Credential, now: datetime) -> Finding:
    """How long this site's certificate lasts."""
    name, ends = "certificate", credential.certificate.not_valid_after_utc
    left = ends - now
    if left <= timedelta():
        return bad(name, f"ended on {ends:%Y-%m-%d %H:%M} UTC", "see the runbook certificate-near-its-end")
    if left < _CERTIFICATE_LOW:
        hint = "it should have been renewed by now: is the agent running and connected?"
        return worrying(name, f"ends in {left.days} days, on {ends:%Y-%m-%d}", hint)
    return good(name, f"{credential.subject.spiffe_id} until {ends:%Y-%m-%d}")


def check_clock(answer: Answer | None) -> Finding:
    """How far this machine's clock is from the coordinator's."""
    name = "clock"
    if answer is None or answer.skew_s is None:
        return skipped(name, "the coordinator did not say its time")
    skew = answer.skew_s
    text = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the coordinator's"
    if abs(skew) > _SKEW_BAD_S:
        return bad(name, text, "set the clock (NTP): certificates are refused before and after their time")
    if abs(skew) > _SKEW_WORRYING_S + (answer.answered_at - answer.asked_at):
        return worrying(name, text, "is NTP running here and there?")
    return good(name, text)


def check_protocol(answer: Answer | None) -> Finding:
    """Whether the coordinator serves agents of this version: the same major, and no newer minor than its own."""
    name, mine = "protocol", f"{PROTOCOL.major}.{PROTOCOL.minor}"
    theirs = "" if answer is None else answer.metadata.get(PROTOCOL_KEY, "")
    major, _, minor = theirs.partition(".")
    if answer is None or not (major.isdecimal() and minor.isdecimal()):
        return skipped(name, "the coordinator did not say its version")
    version = printable(answer.metadata.get(VERSION_KEY, "?"), 40)
    text = f"{mine} (fedimpres {software_version()}), the coordinator's {theirs} (fedimpres {version})"
    served = int(major) == PROTOCOL.major and int(minor) - 1 <= PROTOCOL.minor <= int(minor)
    return good(name, text) if served else bad(name, text, "upgrade the coordinator first, then the agents")


def check_compute(config: AgentConfig) -> Iterator[Finding]:
    """Device and data, opened by a compute process as `serve` opens them."""
    try:
        found = asyncio.run(_describe(config))
    except FedimpresError as error:
        yield bad("data", error.message, error.hint or "see [data] and [compute] in agent.toml")
        return
    gpus = sorted(Path("/dev").glob("nvidia[0-9]*"))
    device = f"{found['device']}: {found['device_name']}, {found['threads']} threads"
    if found["device"] == "cpu" and gpus:
        hint = "install the CUDA build, and the unit's drop-in gpu.conf"
        yield worrying("device", f"{device}, though there is {gpus[0]}", hint)
    else:
        yield good("device", device)
    yield good("data", f"{config.data.kind} at {config.data.path}: {found['num_examples']} training images")


def check_shm(path: Path) -> Finding:
    """Shared memory, through which PyTorch's loaders hand over batches."""
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        return worrying("shm", f"{path}: {error.strerror}", "mount a tmpfs there")
    if free < _SHM_LOW_BYTES or not os.access(path, os.W_OK):
        return worrying("shm", f"{path}: {free // _MB} MB free", "in a container: --shm-size=1g")
    return good("shm", f"{path}: {free // _MB} MB free")


def check_disk(home: Path) -> Finding:
    """Room for models and updates."""
    name, usage = "disk", shutil.disk_usage(home)
    text = f"{home}: {usage.free / 1e9:.1f} GB of {usage.total / 1e9:.1f} GB free"
    if not os.access(home, os.W_OK):
        return bad(name, f"{home} can't be written by this user", "run as the service's user, or chown it")
    if usage.free < _DISK_FULL_BYTES:
        return bad(name, text, "make room: see the runbook disk-full")
    if usage.free < _DISK_LOW_BYTES:
        return worrying(name, text, "make room before it is full: see the runbook disk-full")
    return good(name, text)


async def _describe(config: AgentConfig) -> dict[str, object]:
    host = ComputeHost("fedagent.compute")
    try:
        return await host.run(
            "describe",
            {"data": config.data.model_dump(mode="json"), "compute": config.compute.model_dump(mode="json")},
        )
    finally:
        await host.close()


class _Coordinator:
    """The coordinator's health service, called as this site."""

    def __init__(self, credential: Credential, proxy: str | None) -> None:
        self._credential = credential
        self._channel = open_sync_channel(credential, proxy=proxy)
        self._stub = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> "_Coordinator":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def reach(self) -> tuple[Answer | None, Finding]:
        """Ask for the coordinator's health."""
        name = "coordinator"
        asked_at = time.time()
        try:
            reply, call = self._stub.Check.with_call(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.RpcError as error:
            failure = from_rpc_error(error, f"coordinator {self._credential.coordinator}")
            return None, bad(name, failure.message, failure.hint or "see the lines before this one")
        answered_at = time.time()
        metadata = {str(key): str(value) for key, value in call.initial_metadata() or ()}
        answer = Answer(asked_at, answered_at, metadata)
        text = f"{self._credential.coordinator} answers in {(answered_at - asked_at) * 1e3:.0f} ms"
        if reply.status != health_pb2.HealthCheckResponse.SERVING:
            return answer, worrying(name, f"{text}, but says that it does not serve", "ask its operator")
        return answer, good(name, text)

    def measure(self) -> Finding:
        """How fast bytes leave this site: a question of 1 MiB, which the coordinator answers with "no such service"."""
        name = "throughput"
        began = time.monotonic()
        try:
            self._stub.Check(health_pb2.HealthCheckRequest(service="x" * _PROBE_BYTES), timeout=60)
        except grpc.RpcError as error:
            failure = from_rpc_error(error, "coordinator")
            if not isinstance(failure, NotFoundError):
                return worrying(name, failure.message, "try again")
        seconds = time.monotonic() - began
        speed = _PROBE_BYTES / seconds
        text = f"{speed * 8 / 1e6:.1f} Mbit/s out ({_PROBE_BYTES >> 20} MiB in {seconds:.2f} s)"
        if speed < _SLOW_BYTES_PER_S:
            return worrying(name, text, "an update of 45 MB takes over 6 minutes: raise the plan's deadline")
        return good(name, text)
