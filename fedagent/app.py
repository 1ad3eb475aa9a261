"""The agent, put together: reads the configuration once, wires the parts, and runs until told to stop."""

import asyncio
import contextlib
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import structlog

from fedagent.config import AgentConfig, AgentHome
from fedagent.driver import AgentDriver
from fedagent.tasks import Tasks
from fedagent.transfer import Transfers
from fedcore import lifeline as lifelines
from fedcore.artifact_store import ArtifactStore
from fedcore.channel import open_channel
from fedcore.compute_host import ComputeHost
from fedcore.config import load_config
from fedcore.credential import load_credential
from fedcore.errors import ConfigError
from fedcore.home_lock import HomeLock
from fedcore.logs import configure_logs

log = structlog.get_logger(__name__)


def run(home: Path, data: Path | None, lifeline: int | None) -> int:
    """Serve until SIGTERM, SIGINT or the end of the lifeline. Returns the exit code. Raises FedimpresError."""
    places = AgentHome(home)
    if not places.credential.is_dir():
        raise ConfigError(f"{home} is not enrolled", hint="run `fedagent enroll` first")
    config = load_agent_config(places, data)
    configure_logs(config.log_level)
    with HomeLock(places.lock):
        return asyncio.run(_serve(places, config, lifeline))


def load_agent_config(places: AgentHome, data: Path | None) -> AgentConfig:
    """agent.toml, with the data's path replaced if one is given."""
    config = load_config(places.config, AgentConfig)
    if data is None:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"path": str(data.resolve())})})


async def _serve(places: AgentHome, config: AgentConfig, lifeline: int | None) -> int:
    stop = asyncio.Event()
    stop_on_signals(stop.set, lifeline)
    site = load_credential(places.credential, datetime.now(UTC)).subject.id
    store = ArtifactStore(places.artifacts)
    threads = config.compute.threads
    environment = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    compute = ComputeHost("fedagent.compute", environment=environment)
    driver = AgentDriver(
        site, lambda: open_channel(places.credential, proxy=config.proxy), config.reconnect_max_s, threads
    )
    transfers = Transfers(site, store, driver.stub)
    tasks = Tasks(site, places, config, compute, store, transfers, driver.send)
    log.info("agent starts", site=site, home=str(places.root))
    serving = asyncio.create_task(driver.serve(tasks))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    failed = serving.done()
    serving.cancel()
    stopping.cancel()
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await serving
    finally:
        await compute.close()
    log.info("agent stopped", site=site)
    return 1 if failed else 0


def stop_on_signals(stop: Callable[[], None], lifeline: int | None) -> None:
    """Call `stop` in the running loop on SIGTERM, SIGINT and the end of the lifeline."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    if lifeline is not None:
        lifelines.watch(lifeline, lambda: loop.call_soon_threadsafe(stop))
