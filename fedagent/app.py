"""The agent, put together: reads the configuration once, wires the parts, and runs until told to stop."""

import asyncio
import contextlib
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import structlog

from fedagent.audit import SiteAudit, open_site_audit
from fedagent.config import AgentConfig, AgentHome, load_agent_config
from fedagent.driver import AgentDriver
from fedagent.gate import SiteGate
from fedagent.held_impressions import HeldImpressions
from fedagent.line import Line, explain_foreign_certificate
from fedagent.policy import SitePolicy, load_policy
from fedagent.purging import Purging
from fedagent.renewal import Renewal
from fedagent.shared_log import LogRing, SharedLog
from fedagent.status_file import StatusBoard
from fedagent.tasks import Send, Tasks
from fedagent.throttle import throttle_of
from fedagent.transfer import Transfers
from fedcore import lifeline as lifelines
from fedcore.artifact_store import ArtifactStore
from fedcore.channel import open_channel
from fedcore.clock import SystemClock
from fedcore.compute_host import ComputeHost
from fedcore.credential import load_credential, split_address
from fedcore.errors import ConfigError, FedimpresError, ForeignCertificateError
from fedcore.home_lock import HomeLock
from fedcore.logs import configure_logs
from fedcore.memory import use_one_malloc_arena
from fedcore.metrics_port import Page, metrics_port
from fedcore.service_manager import ServiceManager
from fedcore.v1 import federation_pb2

log = structlog.get_logger(__name__)


def run(home: Path, data: Path | None, lifeline: int | None) -> int:
    """Serve until SIGTERM, SIGINT or the end of the lifeline. Returns the exit code. Raises FedimpresError."""
    places = AgentHome(home)
    if not places.credential.is_dir():
        raise ConfigError(f"{home} is not enrolled", hint="run `fedagent enroll` first")
    config = load_agent_config(places, data)
    policy = load_policy(places.policy)
    ring = LogRing()
    configure_logs(config.log_level, keep=ring)
    use_one_malloc_arena()
    with HomeLock(places.lock):
        return asyncio.run(_serve(places, config, policy, SharedLog(ring, policy), lifeline))


async def _serve(
    places: AgentHome, config: AgentConfig, policy: SitePolicy, shared_log: SharedLog, lifeline: int | None
) -> int:
    stop = asyncio.Event()
    stop_on_signals(stop.set, lifeline)
    site = load_credential(places.credential, datetime.now(UTC), allow_expired=True).subject.id
    store = ArtifactStore(places.artifacts)
    threads = config.compute.threads
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    compute = ComputeHost("fedagent.compute", environment=environment)
    manager = ServiceManager.from_environment()
    audit_file = open_site_audit(places.audit)
    audit = SiteAudit(audit_file)
    purging = Purging(HeldImpressions(places.artifacts), audit)
    board = StatusBoard(places.status, site, manager.status)
    driver = AgentDriver(
        site,
        lambda: open_channel(places.credential, proxy=config.proxy),
        config.reconnect_max_s,
        threads,
        gate=SiteGate(places.paused, policy),
        board=board,
        explain=lambda error: _look_at_line(error, places, config.proxy),
        audit=audit,
        shared_log=shared_log,
        purging=purging,
    )
    transfers = Transfers(site, store, driver.stub, throttle_of(policy.bandwidth_mbit_s), audit=audit)
    page, send = _metrics(config, places, driver, board, transfers)
    tasks = Tasks(site, places, config, compute, store, transfers, send, policy, audit=audit)
    log.info("agent starts", site=site, home=str(places.root))
    renewal = Renewal(places.credential, config.proxy, driver.certificates, driver.reconnect)
    driver.when_asked_to_renew(renewal.hurry)
    try:
        async with metrics_port(config.metrics.port, page):
            failed = await _serve_until(stop, driver, tasks, renewal, compute, manager)
    finally:
        audit_file.close()
    log.info("agent stopped", site=site)
    return 1 if failed else 0


async def _serve_until(
    stop: asyncio.Event,
    driver: AgentDriver,
    tasks: Tasks,
    renewal: Renewal,
    compute: ComputeHost,
    manager: ServiceManager,
) -> bool:
    """Work until told to stop. Returns whether it ended for another reason."""
    serving = asyncio.create_task(driver.serve(tasks))
    renewing = asyncio.create_task(renewal.serve())
    stopping = asyncio.create_task(stop.wait())
    watchdog = asyncio.create_task(manager.watch(lambda: compute.stuck(manager.watchdog_s)))
    # Ready without a connection: a site comes up, and is seen to, while the coordinator is away.
    manager.ready()
    await asyncio.wait({serving, renewing, stopping}, return_when=asyncio.FIRST_COMPLETED)
    manager.stopping()
    failed = serving.done() or renewing.done()
    serving.cancel()
    renewing.cancel()
    stopping.cancel()
    try:
        for work in (serving, renewing):
            with contextlib.suppress(asyncio.CancelledError):
                await work
    finally:
        await compute.close()
        watchdog.cancel()
    return failed


def _metrics(
    config: AgentConfig, places: AgentHome, driver: AgentDriver, board: StatusBoard, transfers: Transfers
) -> tuple[Page | None, Send]:
    """The page of metrics, None unless it is asked for; and how tasks send messages, so that metrics hear of them."""
    if config.metrics.port is None:
        return None, driver.send
    from fedagent.metrics import AgentMetrics, Seen
    from fedcore.metrics_page import MetricsPage, new_registry

    registry = new_registry()
    seen = Seen(lambda: board.status, lambda: driver.working, transfers, places.root, places.credential)
    metrics = AgentMetrics(seen, registry)

    def send(message: federation_pb2.AgentMessage) -> None:
        metrics.said(message)
        driver.send(message)

    return MetricsPage(registry, metrics.look, SystemClock()), send


def _look_at_line(
    error: ForeignCertificateError, places: AgentHome, proxy: str | None
) -> ForeignCertificateError:
    """Name who shows a foreign certificate where the coordinator should be. Called in a thread."""
    try:
        credential = load_credential(places.credential, datetime.now(UTC), allow_expired=True)
    except FedimpresError:
        return error
    line = Line(*split_address(credential.coordinator), proxy)
    return explain_foreign_certificate(error, line, credential.ca_pem + credential.chain_pem)


def stop_on_signals(stop: Callable[[], None], lifeline: int | None) -> None:
    """Call `stop` in the running loop on SIGTERM, SIGINT and the end of the lifeline."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if lifeline is not None:
        lifelines.watch(lifeline, lambda: loop.call_soon_threadsafe(stop))
