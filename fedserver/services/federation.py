"""What agents call. The site is always the caller's certificate's; a message that says otherwise is refused."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import structlog

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.errors import (
    ConflictError,
    FedimpresError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    TransferError,
)
from fedcore.protocol import PROTOCOL, SESSION_KEY, check_version
from fedcore.raw_chunks import RawChunk
from fedcore.term import term_to_proto
from fedcore.text import printable
from fedcore.v1 import federation_pb2, federation_pb2_grpc
from fedcore.version import software_version
from fedserver import round_events as ev
from fedserver.audit_exchange import AuditExchange
from fedserver.call_audit import note
from fedserver.deliveries import Deliveries
from fedserver.directives import metrics_from_proto
from fedserver.downloads import stream_artifact
from fedserver.interceptors import caller_of
from fedserver.questions import answered
from fedserver.registry import Registry
from fedserver.roster import Roster, Session, SiteProgress
from fedserver.round_driver import RoundDriver
from fedserver.site_purges import SitePurges
from fedserver.statistics_intake import StatisticsIntake
from fedserver.suitability import checked_capabilities
from fedserver.turns import Turns

_MAX_REASON = 500
log = structlog.get_logger(__name__)


class FederationService(federation_pb2_grpc.FederationServicer):
    """The site's side of the coordinator."""

    def __init__(
        self,
        federation: str,
        heartbeat_interval_s: float,
        driver: RoundDriver,
        roster: Roster,
        deliveries: Deliveries,
        statistics: StatisticsIntake,
        registry: Registry,
        pool: ThreadPoolExecutor,
        turns: Turns,
        audit: AuditExchange,
        purges: SitePurges,
        newest_issuer: Callable[[], str],
    ) -> None:
        self._federation = federation
        self._heartbeat_interval_s = heartbeat_interval_s
        self._driver = driver
        self._roster = roster
        self._deliveries = deliveries
        self._statistics = statistics
        self._registry = registry
        self._pool = pool
        self._turns = turns
        self._audit = audit
        self._purges = purges
        # The CA that signs for members now: who connects with a certificate of an older one is asked to renew.
        self._newest_issuer = newest_issuer

    async def Hello(  # noqa: N802
        self, request: federation_pb2.HelloRequest, context: Any
    ) -> federation_pb2.HelloReply:
        """Check versions, note what the site can do, name the session."""
        site = caller_of(context).id
        check_version(request.protocol, f"agent {site}")
        self._registry.check_admitted(site)
        heads, _ = await asyncio.gather(
            self._audit.hello(site, request), self._registry.touch(site, datetime.now(UTC))
        )  # one commit
        session = self._roster.greet(site, checked_capabilities(request.capabilities))
        return federation_pb2.HelloReply(
            audit_head=heads.ours,
            kept_audit_head=heads.kept,
            protocol=PROTOCOL,
            federation=self._federation,
            session=session,
            heartbeat_interval_s=self._heartbeat_interval_s,
            software_version=software_version(),
            term=term_to_proto(heads.term),
        )

    async def Directives(  # noqa: N802
        self, request_iterator: AsyncIterator[federation_pb2.AgentMessage], context: Any
    ) -> AsyncIterator[federation_pb2.Directive]:
        """Send directives for as long as the agent is connected, taking in what it says of its work."""
        site = self._admitted(context)
        metadata = dict(context.invocation_metadata() or ())
        session = self._roster.open(site, str(metadata.get(SESSION_KEY, "")))
        log.info(
            "agent connected", site=site, session=session.id, version=session.capabilities.software_version
        )
        if caller_of(context).issuer != self._newest_issuer():
            session.send(federation_pb2.Directive(renew_certificate=federation_pb2.RenewCertificate()))
        if (drain := self._driver.draining) is not None:
            session.send(drain.directive())
        self._purges.ask(session)  # before any task: what is purged is not trained on
        self._driver.nudge()
        reader = asyncio.create_task(self._read(session, request_iterator))
        try:
            while (directive := await session.outbox.get()) is not None:
                yield directive
        finally:
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await reader
            self._roster.close(session)
            log.info("agent left", site=site, session=session.id)
            self._driver.nudge()
        if session.refusal is not None:
            raise session.refusal

    async def _read(self, session: Session, messages: AsyncIterator[federation_pb2.AgentMessage]) -> None:
        try:
            async for message in messages:
                self._roster.touch(session)
                await self._take(session, message)
        except FedimpresError as error:
            log.warning(
                "agent's stream ended",
                site=session.site,
                session=session.id,
                code=error.code,
                error=str(error),
            )
        except Exception:
            log.exception("agent's stream failed", site=session.site, session=session.id)
        finally:
            session.end()

    async def _take(self, session: Session, message: federation_pb2.AgentMessage) -> None:
        """Turn a message of the agent's into what it means for its run; one that comes too late is only logged."""
        site, at = session.site, self._driver.wall()
        try:
            match message.WhichOneof("message"):
                case "started":
                    self._progress(session, "starting")
                    started = message.started
                    await self._driver.post(
                        started.run, ev.TaskStarted(at=at, round=started.round, site=site)
                    )
                case "progress":
                    self._progress(session, message.progress.stage, message.progress)
                case "failed":
                    failed, reason = message.failed, printable(message.failed.reason, _MAX_REASON)
                    kind = _what_failed(failed)
                    await self._driver.post(
                        failed.run, kind(at=at, round=failed.round, site=site, reason=reason)
                    )
                case "statistics":
                    await self._statistics.take(site, at, message.statistics)
                    self._progress(session, "measured")
                case "evaluation":
                    report = message.evaluation
                    await self._driver.post(report.run, self._figures(site, at, report))
                    self._progress(session, "evaluated")
                case "capabilities":
                    session.learn(checked_capabilities(message.capabilities))
                    self._driver.nudge()
                case "pong":
                    answered(session, message.pong.nonce, message)
                case "log_lines":
                    answered(session, message.log_lines.nonce, message)
                case "impressions_held":
                    self._purges.held(session, message.impressions_held)
                case "impressions_purged":
                    await self._purges.confirmed(site, message.impressions_purged)
                case _:
                    pass
        except (ConflictError, NotFoundError) as error:
            log.info("agent's message came too late", site=site, error=error.message)

    def _figures(self, site: str, at: float, report: federation_pb2.EvaluationReport) -> ev.Event:
        """A site's figures as a fact; figures that can't be are the fact that the site gave none."""
        classes = self._driver.view(report.run).state.plan.model.classes
        try:
            metrics = metrics_from_proto(report, classes, f"{site} round {report.round}")
        except TransferError as error:
            log.warning("figures refused", site=site, run=report.run, error=error.message)
            return ev.EvaluationLetGo(at=at, round=report.round, site=site, reason=str(error))
        return ev.EvaluationReported(at=at, round=report.round, site=site, metrics=metrics)

    def _progress(self, session: Session, stage: str, said: federation_pb2.Progress | None = None) -> None:
        said = said or federation_pb2.Progress()
        loss, speed = (x if math.isfinite(x) else 0.0 for x in (said.loss, said.images_per_s))
        session.progress = SiteProgress(printable(stage, 40), said.done, said.total, loss, speed)
        self._roster.progressed(session.site)

    async def Fetch(  # noqa: N802
        self, request: federation_pb2.FetchRequest, context: Any
    ) -> AsyncIterator[Any]:
        """Stream a model, impressions or strategy's state that the site's present work needs."""
        site = self._admitted(context)
        note(f"artifact/{request.digest}", offset=request.offset)
        path = self._driver.readable_by(site, request.digest)
        sent = 0
        async for part in stream_artifact(path, request.digest, request.offset, self._pool, self._turns):
            yield part
            if isinstance(part, RawChunk):
                self._driver.count_down(len(part.data))
                note(bytes=(sent := sent + len(part.data)))
                self._roster.progressed(site)

    async def DeliveryOffset(  # noqa: N802
        self, request: federation_pb2.DeliveryOffsetRequest, context: Any
    ) -> federation_pb2.DeliveryOffsetReply:
        """Say where a delivery goes on."""
        return self._deliveries.offset(_own(request.key, self._admitted(context)), request.key)

    async def Deliver(  # noqa: N802
        self, request_iterator: AsyncIterator[federation_pb2.DeliverPart], context: Any
    ) -> federation_pb2.DeliverReply:
        """Take an update in."""
        caller = self._admitted(context)
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("part") != "header":
            raise ProtocolError(f"{caller}: a delivery must begin with a header")
        site = _own(first.header.key, caller)
        key = first.header.key
        note(f"artifact/{key.digest}", run=key.run, round=key.round, offset=first.header.offset)
        outcome = await self._deliveries.receive(site, first.header, request_iterator)
        session = self._roster.sessions.get(site)
        if session is not None:
            self._progress(session, "reported")
        note(outcome=federation_pb2.DeliverReply.Outcome.Name(outcome))
        return federation_pb2.DeliverReply(outcome=outcome)

    def _admitted(self, context: object) -> str:
        """The calling site. Raises PermissionDeniedError while an operator keeps it out."""
        site = caller_of(context).id
        self._registry.check_admitted(site)
        return site


def _what_failed(
    failed: federation_pb2.TaskFailed,
) -> type[ev.SiteLetGo | ev.StatisticsLetGo | ev.EvaluationLetGo]:
    """The fact that a failed task is."""
    if failed.recalibrating:
        return ev.StatisticsLetGo
    return ev.EvaluationLetGo if failed.evaluating else ev.SiteLetGo


def _own(key: federation_pb2.DeliveryKey, site: str) -> str:
    """The caller's site, if the key is its own. Raises PermissionDeniedError."""
    if key.site != site:
        raise PermissionDeniedError(f"{site} may not deliver for {key.site[:80]!r}")
    return site
