"""The Operations service: is the coordinator well, how is it set up, may it open rounds, what happened to a run."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.errors import PlanError, ProtocolError
from fedcore.plan import parse_plan
from fedcore.software import software
from fedcore.text import printable
from fedcore.v1 import operations_pb2, operations_pb2_grpc
from fedcore.version import software_version
from fedserver.call_audit import note
from fedserver.config import ServerConfig
from fedserver.debug_bundle import DebugBundle
from fedserver.drain import Drain
from fedserver.dry_run import DryRun
from fedserver.effective_config import settings_of
from fedserver.event_text import event_message, submission_message
from fedserver.health_facts import HealthFacts
from fedserver.interceptors import caller_of
from fedserver.journal import Journal
from fedserver.round_driver import RoundDriver
from fedserver.services.admin import MAX_PLAN_BYTES

_MAX_REASON = 300
_PAGE_EVENTS = 500


class OperationsService(operations_pb2_grpc.OperationsServicer):
    """Message <-> what the parts say of themselves, nothing else."""

    def __init__(
        self,
        config: ServerConfig,
        driver: RoundDriver,
        journal: Journal,
        health: HealthFacts,
        dry_run: DryRun,
        bundle: DebugBundle,
    ) -> None:
        self._config = config
        self._driver = driver
        self._journal = journal
        self._health = health
        self._dry_run = dry_run
        self._bundle = bundle

    async def GetHealth(  # noqa: N802 - the name in the contract
        self, request: operations_pb2.GetHealthRequest, context: Any
    ) -> operations_pb2.GetHealthReply:
        """Look at every part now."""
        facts = await self._health.collect()
        return operations_pb2.GetHealthReply(
            healthy=all(fact.healthy for fact in facts),
            facts=[
                operations_pb2.HealthFact(
                    check=fact.check,
                    subject=fact.subject,
                    healthy=fact.healthy,
                    says=fact.says,
                    hint=fact.hint,
                    figures=fact.figures,
                )
                for fact in facts
            ],
            drain=self._drain_state(),
            software_version=software_version(),
        )

    async def GetConfig(  # noqa: N802
        self, request: operations_pb2.GetConfigRequest, context: Any
    ) -> operations_pb2.GetConfigReply:
        """The configuration that was read at the start."""
        return operations_pb2.GetConfigReply(
            settings=[
                operations_pb2.Setting(key=one.key, value_json=json.dumps(one.value), from_file=one.from_file)
                for one in settings_of(self._config)
            ]
        )

    async def SetDrain(  # noqa: N802
        self, request: operations_pb2.SetDrainRequest, context: Any
    ) -> operations_pb2.DrainState:
        """Open no further round, or open them again. A repeated drain keeps its beginning."""
        reason = printable(request.reason, _MAX_REASON)
        note("coordinator", draining=request.draining, reason=reason)
        if not request.draining:
            self._driver.drain(None)
        elif self._driver.draining is None:
            self._driver.drain(Drain.begun(caller_of(context).id, reason, self._driver.wall()))
        return self._drain_state()

    async def GetSoftware(  # noqa: N802
        self, request: operations_pb2.GetSoftwareRequest, context: Any
    ) -> operations_pb2.GetSoftwareReply:
        """Versions of what computes and talks here."""
        return operations_pb2.GetSoftwareReply(software_json=json.dumps(software()))

    async def CheckPlan(  # noqa: N802
        self, request: operations_pb2.CheckPlanRequest, context: Any
    ) -> operations_pb2.CheckPlanReply:
        """Say what a plan would meet."""
        if (size := len(request.plan_toml.encode())) > MAX_PLAN_BYTES:
            raise PlanError(f"plan: {size} bytes of TOML, expected at most {MAX_PLAN_BYTES} (1 MiB)")
        found = await self._dry_run.check(parse_plan(request.plan_toml))
        return operations_pb2.CheckPlanReply(forecast_json=found.model_dump_json())

    async def WatchEvents(  # noqa: N802
        self, request: operations_pb2.WatchEventsRequest, context: Any
    ) -> AsyncIterator[operations_pb2.RunEvent]:
        """Send what happened to a run, page by page, and what happens if asked to; the end of the run ends it."""
        view = self._driver.view(request.run)
        since, position = _moment(request.since), request.after
        if position == 0 and _moment(view.submission.submitted_at) >= since:
            yield submission_message(view.submission)
        while True:
            over = (
                view.state.status.final
            )  # looked at before the journal: what ends a run is then in the page
            page = await asyncio.to_thread(self._journal.records, view.state.run, position, _PAGE_EVENTS)
            for position, event in page:
                if event.at >= since or event.kind == "run_finished":
                    yield event_message(view.state.run, position, event)
            if page:
                continue
            if over or not request.follow:
                return
            await self._driver.wait_changed(1.0)

    async def CollectBundle(  # noqa: N802
        self, request: operations_pb2.CollectBundleRequest, context: Any
    ) -> AsyncIterator[operations_pb2.BundlePart]:
        """Send the files of a debug bundle."""
        note("coordinator")
        async for name, data in self._bundle.pieces():
            yield operations_pb2.BundlePart(name=name, data=data)

    def _drain_state(self) -> operations_pb2.DrainState:
        drain, under_way = self._driver.draining, self._driver.under_way()
        state = operations_pb2.DrainState(quiet=not under_way, under_way=under_way)
        if drain is not None:
            state.draining, state.since = True, drain.since_text
            state.by, state.reason = drain.by, drain.reason
        return state


def _moment(text: str) -> float:
    """RFC 3339 as seconds since the epoch; 0 if empty. Raises ProtocolError."""
    if not text:
        return 0.0
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ProtocolError(f"{text[:60]!r} is no moment of RFC 3339 with a time zone")
    return moment.timestamp()
