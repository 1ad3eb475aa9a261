"""The coordinator, put together: reads the configuration once, wires the parts, drains on SIGTERM."""

import asyncio
import contextlib
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from fedcore import lifeline as lifelines
from fedcore.artifact_store import ArtifactStore
from fedcore.audit import Fact
from fedcore.audit_store import AuditLog
from fedcore.channel import SERVER_OPTIONS, renewable_server_credentials
from fedcore.clock import SystemClock
from fedcore.compute_host import ComputeHost
from fedcore.credential import join_address
from fedcore.database import Database, open_database
from fedcore.errors import ConfigError, StorageError
from fedcore.home_lock import HomeLock
from fedcore.logs import configure_logs
from fedcore.memory import use_one_malloc_arena
from fedcore.metrics_port import Page, metrics_port
from fedcore.plan import Plan
from fedcore.service_manager import ServiceManager
from fedcore.v1 import (
    access_pb2_grpc,
    admin_pb2_grpc,
    audit_pb2_grpc,
    backup_pb2_grpc,
    certificates_pb2_grpc,
    enrollment_pb2_grpc,
    federation_pb2_grpc,
    impressions_pb2_grpc,
    membership_pb2_grpc,
    operations_pb2_grpc,
    sites_pb2_grpc,
)
from fedcore.version import software_version
from fedserver.audit_exchange import AuditExchange
from fedserver.call_audit import CallAudit
from fedserver.certificates import Certificates
from fedserver.checks import load_home
from fedserver.compute_work import ComputeWork
from fedserver.config import ServerConfig, ServerHome
from fedserver.debug_bundle import DebugBundle, Examined
from fedserver.deliveries import Deliveries
from fedserver.descriptors import allow_descriptors
from fedserver.dry_run import DryRun
from fedserver.enrollment_requests import EnrollmentRequests
from fedserver.grants import Grants
from fedserver.health_facts import HealthFacts, Watched
from fedserver.interceptors import edge_interceptors
from fedserver.journal import Journal
from fedserver.journal_end import JournalEnd
from fedserver.limits import Limits
from fedserver.log_tail import LogTail
from fedserver.model_keeper import ModelKeeper
from fedserver.own_certificate import OwnCertificate
from fedserver.registry import Registry
from fedserver.retention import sweep
from fedserver.roster import Roster
from fedserver.rotation import AuthorityKeeper, Rotation
from fedserver.round_driver import RoundDriver
from fedserver.schema import MIGRATIONS
from fedserver.services.access import AccessService
from fedserver.services.admin import AdminService
from fedserver.services.audit import AuditService
from fedserver.services.backup import BackupService
from fedserver.services.certificates import CertificatesService
from fedserver.services.enrollment import EnrollmentService
from fedserver.services.federation import FederationService
from fedserver.services.health import HealthService
from fedserver.services.impressions import ImpressionsService
from fedserver.services.membership import MembershipService
from fedserver.services.operations import OperationsService
from fedserver.services.sites import SitesService
from fedserver.site_purges import SitePurges
from fedserver.statistics_intake import StatisticsIntake
from fedserver.strategies import makes_impressions
from fedserver.terms import Terms
from fedserver.tokens import Tokens
from fedserver.turns import Turns

# isort: split
import grpc
from grpc_health.v1 import health_pb2_grpc

if TYPE_CHECKING:
    from fedserver.run_meter import RunMeter

_TRANSFER_THREADS = 8
_DRAIN_S = 2.0
_LOOK_S = 0.5
_SERVICES = (
    "Federation", "Admin", "Certificates", "Access", "Membership", "Audit", "Operations", "Sites", "Impressions",
    "Backup",
    "Enrollment",
)  # fmt: skip
log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Coordinator:
    """The parts that live as long as the program."""

    config: ServerConfig
    registry: Registry
    certificates: Certificates
    grants: Grants
    audit: AuditLog
    terms: Terms
    keeper: AuthorityKeeper
    own: OwnCertificate
    rotation: Rotation
    store: ArtifactStore
    roster: Roster
    driver: RoundDriver
    compute: ComputeHost
    work: ComputeWork
    health: HealthService
    facts: HealthFacts
    log_tail: LogTail
    models: ModelKeeper
    pool: ThreadPoolExecutor
    turns: Turns
    # None unless metrics are asked for.
    meter: "RunMeter | None"


def run(home: Path, lifeline: int | None) -> int:
    """Serve until SIGTERM, SIGINT or the end of the lifeline. Returns the exit code. Raises FedimpresError."""
    places = ServerHome(home)
    config = load_home(home)
    log_tail = LogTail()
    configure_logs(config.log_level, keep=log_tail)
    use_one_malloc_arena()
    allow_descriptors(config.admission.max_agents)
    with HomeLock(places.lock):
        database = open_database(places.database, MIGRATIONS)
        try:
            return asyncio.run(_serve(places, config, database, lifeline, log_tail))
        finally:
            database.close()


async def _serve(
    places: ServerHome, config: ServerConfig, database: Database, lifeline: int | None, log_tail: LogTail
) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if lifeline is not None:
        lifelines.watch(lifeline, lambda: loop.call_soon_threadsafe(stop.set))
    manager = ServiceManager.from_environment()
    parts = _assemble(places, config, database, log_tail)
    lost = JournalEnd(places.journal_end).lost(database)
    parts.driver.recover()
    sweep(parts.store, [view.state for view in parts.driver.views()])
    await parts.own.prepare()
    await parts.audit.record(Fact("coordinator.start", "coordinator", detail={"version": software_version()}))
    if lost:
        await parts.audit.record(Fact("journal.lost", "coordinator", detail={"records": lost}))
    async with metrics_port(config.metrics.port, _metrics_page(parts, database)):
        return await _serve_until(stop, parts, places, database, manager)


async def _serve_until(
    stop: asyncio.Event, parts: Coordinator, places: ServerHome, database: Database, manager: ServiceManager
) -> int:
    config = parts.config
    servers = await _start_servers(parts, places, database)
    driving = asyncio.create_task(_drive(parts, manager))
    renewing = asyncio.create_task(parts.own.serve())
    watching = asyncio.create_task(parts.rotation.watch())
    keeping = asyncio.create_task(parts.models.serve())
    stopping = asyncio.create_task(stop.wait())
    watchdog = asyncio.create_task(manager.watch(lambda: parts.compute.stuck(manager.watchdog_s)))
    manager.ready()
    log.info(
        "coordinator serves",
        term=str(parts.terms.current()),
        federation=config.name,
        address=join_address(config.host, config.port),
        enrolment=join_address(config.host, config.enroll_port),
        runs=len(parts.driver.views()),
    )
    try:
        working = (driving, renewing, watching, keeping)
        await asyncio.wait({stopping, *working}, return_when=asyncio.FIRST_COMPLETED)
        for work in working:
            if work.done():
                work.result()
        return 0
    finally:
        manager.stopping()
        stopping.cancel()
        renewing.cancel()
        watching.cancel()
        keeping.cancel()
        await _drain(parts, servers, driving)
        watchdog.cancel()


async def _drive(parts: Coordinator, manager: ServiceManager) -> None:
    """Wait until this coordinator may serve, then drive its runs."""
    config = parts.config
    if parts.terms.held():
        log.warning("restored from a backup: nobody is served before 'fedserver release'")
        manager.status("restored from a backup; waits for 'fedserver release'")
        while parts.terms.held():  # noqa: ASYNC110 - another process releases it
            await asyncio.sleep(_LOOK_S)
        parts.certificates.forget_checked()
        parts.terms.let_in()
        log.info("released")
    for service in _SERVICES:
        parts.health.set(f"fedcore.v1.{service}", True)
    manager.status(f"serves federation {config.name} at {join_address(config.host, config.port)}")
    await parts.driver.serve()


def _assemble(places: ServerHome, config: ServerConfig, database: Database, log_tail: LogTail) -> Coordinator:
    clock = SystemClock()
    store = ArtifactStore(places.artifacts)
    roster = Roster(clock, config.admission.max_agents)
    threads = config.compute.threads
    compute = ComputeHost(
        "fedserver.compute", environment={"OMP_NUM_THREADS": str(threads)} if threads else {}
    )
    registry = Registry(database)
    keeper = AuthorityKeeper(places.pki, config.name, config.certificates.lifetimes())
    certificates = Certificates(database, keeper.current)
    own = OwnCertificate(places.credential, config.host, certificates)
    pool = ThreadPoolExecutor(_TRANSFER_THREADS, thread_name_prefix="transfer")
    work = ComputeWork(compute, store, clock, config.compute.model_dump(), pool)
    meter = _run_meter(config)
    driver = RoundDriver(
        Journal(
            database,
            meter.recorded if meter is not None else None,
            end=JournalEnd(places.journal_end),
        ),
        store,
        roster,
        work,
        clock,
        _expected_sites(registry),
        makes_impressions,
        registry.withheld,
    )
    health = HealthService()
    audit = AuditLog(database)
    models = ModelKeeper(driver, store, audit, config.storage.quota_bytes)
    facts = HealthFacts(
        Watched(
            database, store, compute, own.current, keeper.current, registry, roster,
            health.services, driver.journal_lag_s, lambda: driver.draining, models.usage,
        ),
        clock,
    )  # fmt: skip
    turns = Turns(config.admission.max_transfers)
    return Coordinator(
        config,
        registry,
        certificates,
        Grants(database),
        audit,
        Terms(database),
        keeper,
        own,
        Rotation(certificates, keeper, own, roster),
        store,
        roster,
        driver,
        compute,
        work,
        health,
        facts,
        log_tail,
        models,
        pool,
        turns,
        meter,
    )


def _run_meter(config: ServerConfig) -> "RunMeter | None":
    if config.metrics.port is None:
        return None
    from fedcore.metrics_page import new_registry
    from fedserver.run_meter import RunMeter

    return RunMeter(new_registry())


def _metrics_page(parts: Coordinator, database: Database) -> Page | None:
    if parts.meter is None:
        return None
    from fedcore.metrics_page import MetricsPage
    from fedserver.metrics import CoordinatorMetrics, Seen

    seen = Seen(parts.facts, parts.driver, parts.roster, parts.registry, database)
    metrics = CoordinatorMetrics(seen, SystemClock(), parts.meter)
    return MetricsPage(parts.meter.registry, metrics.look, SystemClock())


def _expected_sites(registry: Registry) -> Callable[[Plan], tuple[str, ...]]:
    """The sites of a run that leaves the queue: those its plan names, else all that are enrolled and enabled."""

    def sites(plan: Plan) -> tuple[str, ...]:
        return plan.sites if plan.sites is not None else tuple(registry.enabled_sites())

    return sites


async def _start_servers(
    parts: Coordinator, places: ServerHome, database: Database
) -> tuple[grpc.aio.Server, grpc.aio.Server]:
    config, driver = parts.config, parts.driver
    coordinator = join_address(config.host, config.port)
    tokens = Tokens(
        database,
        parts.keeper.current,
        coordinator=coordinator,
        enroll_port=config.enroll_port,
    )
    purges = SitePurges(driver, parts.roster, parts.audit)
    spool_bytes = config.limits.spool_bytes
    deliveries = Deliveries(
        driver, parts.store, parts.roster, places.spool, parts.pool, parts.turns, spool_bytes
    )
    federation = FederationService(
        config.name,
        config.heartbeat_interval_s,
        driver,
        parts.roster,
        deliveries,
        StatisticsIntake(driver, parts.store, parts.pool),
        parts.registry,
        parts.pool,
        parts.turns,
        AuditExchange(database, parts.audit),
        purges,
        lambda: parts.keeper.current().issuer,
    )
    journal = Journal(database)
    dry_run = DryRun(
        driver, parts.roster, parts.registry, journal, parts.work, parts.store, parts.models.usage,
        config.heartbeat_interval_s,
    )  # fmt: skip
    admin = AdminService(
        driver,
        parts.roster,
        parts.registry,
        tokens,
        config.name,
        parts.store,
        parts.pool,
        parts.turns,
        datetime.now(UTC),
        spool_bytes,
        parts.rotation.problems,
        dry_run.check_quota,
    )
    requests = EnrollmentRequests(database, parts.keeper.current, config.limits)
    limits = Limits(config.limits)
    enrollment = EnrollmentService(
        tokens, parts.certificates, requests, limits, coordinator, config.enroll_port
    )
    impressions = ImpressionsService(driver, parts.roster, purges, parts.store, parts.pool, parts.turns)
    certificates = CertificatesService(parts.certificates, config.enroll_port, parts.rotation)
    audit = CallAudit(parts.audit)
    main, enrolling = (
        grpc.aio.server(
            interceptors=edge_interceptors(
                config.name,
                parts.certificates.check,
                roles_of=parts.grants.roles_of,
                audit=audit,
                limits=limits,
                check_released=parts.terms.check_released,
            ),
            options=SERVER_OPTIONS,
        )
        for _ in range(2)
    )
    federation_pb2_grpc.add_FederationServicer_to_server(federation, main)
    admin_pb2_grpc.add_AdminServicer_to_server(admin, main)
    certificates_pb2_grpc.add_CertificatesServicer_to_server(certificates, main)
    access_pb2_grpc.add_AccessServicer_to_server(AccessService(parts.grants), main)
    sites = SitesService(parts.registry, parts.roster, driver, parts.certificates, SystemClock())
    sites_pb2_grpc.add_SitesServicer_to_server(sites, main)
    membership_pb2_grpc.add_MembershipServicer_to_server(MembershipService(tokens, requests), main)
    audit_pb2_grpc.add_AuditServicer_to_server(AuditService(parts.audit, parts.grants), main)
    operations = _operations(parts, places, database, journal, dry_run)
    operations_pb2_grpc.add_OperationsServicer_to_server(operations, main)
    impressions_pb2_grpc.add_ImpressionsServicer_to_server(impressions, main)
    backup = BackupService(places, config.name, parts.store, parts.pool, parts.turns)
    backup_pb2_grpc.add_BackupServicer_to_server(backup, main)
    health_pb2_grpc.add_HealthServicer_to_server(parts.health, main)
    enrollment_pb2_grpc.add_EnrollmentServicer_to_server(enrollment, enrolling)
    for server, port, required in ((main, config.port, True), (enrolling, config.enroll_port, False)):
        _listen(
            server,
            config,
            port,
            renewable_server_credentials(parts.own.current, require_client_certificate=required),
        )
    await main.start()
    await enrolling.start()
    for service in _SERVICES:
        parts.health.set(f"fedcore.v1.{service}", False)  # true once runs are driven
    return main, enrolling


def _operations(
    parts: Coordinator, places: ServerHome, database: Database, journal: Journal, dry_run: DryRun
) -> OperationsService:
    config, driver = parts.config, parts.driver
    bundle = DebugBundle(
        Examined(
            places.root, config, database, journal, parts.registry, parts.certificates, parts.roster, driver,
            parts.compute, parts.facts, parts.log_tail,
        )
    )  # fmt: skip
    return OperationsService(config, driver, journal, parts.facts, dry_run, bundle)


def _listen(
    server: grpc.aio.Server, config: ServerConfig, port: int, credentials: grpc.ServerCredentials
) -> None:
    address = f"{config.listen}:{port}"
    try:
        bound = server.add_secure_port(address, credentials)
    except RuntimeError as error:
        bound = 0
        log.debug("bind failed", address=address, error=str(error))
    if bound != port:
        raise ConfigError(
            f"can't listen on {address}: the port is in use, or the address is not this machine's",
            hint="stop the other program, or change port or listen in fedserver.toml",
        )


async def _drain(
    parts: Coordinator, servers: tuple[grpc.aio.Server, grpc.aio.Server], driving: asyncio.Task[None]
) -> None:
    """Stop in order: take no calls, end the streams, withdraw computations, then let the database close."""
    log.info("coordinator stops")
    parts.health.shut_down()
    driving.cancel()
    with contextlib.suppress(asyncio.CancelledError, Exception):  # told already, by _serve
        await driving
    for session in list(parts.roster.sessions.values()):
        session.end()
    await asyncio.gather(*(server.stop(_DRAIN_S) for server in servers))
    await parts.compute.close()
    with contextlib.suppress(StorageError):  # its disk may be why it stops
        await parts.audit.record(Fact("coordinator.stop", "coordinator"))
    parts.pool.shutdown(wait=False, cancel_futures=True)
