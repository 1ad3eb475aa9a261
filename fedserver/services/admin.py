"""What operators call. Each method is a question to, or a fact for, the round driver and the registry."""

import itertools
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.artifact_store import ArtifactStore
from fedcore.errors import ConflictError, NotFoundError, PlanError, ProtocolError, TransferError
from fedcore.plan import Plan, parse_plan
from fedcore.tensor_file import read_manifest
from fedcore.text import printable
from fedcore.v1 import admin_pb2, admin_pb2_grpc, tensor_pb2
from fedcore.version import software_version
from fedserver import round_events as ev
from fedserver.authorisation import GRANTABLE, IMPRESSION_ROLES, denied
from fedserver.call_audit import note, roles_of_call
from fedserver.downloads import stream_artifact
from fedserver.impression_purges import kept, raise_if_purged
from fedserver.interceptors import caller_of
from fedserver.model_drops import has_model, raise_if_dropped
from fedserver.pages import page, token_number
from fedserver.registry import Registry
from fedserver.roster import Roster
from fedserver.round_driver import RoundDriver, RunView
from fedserver.round_state import Status
from fedserver.run_messages import model_message, run_message
from fedserver.site_messages import site_message
from fedserver.strategies import load_strategy
from fedserver.tokens import TOKEN_TTL_S, Tokens
from fedserver.turns import Turns
from fedserver.uploads import receive_model

MAX_PLAN_BYTES = 1 << 20
_MAX_REQUEST_ID = 200
_MAX_REASON = 500


class AdminService(admin_pb2_grpc.AdminServicer):
    """The operator's side of the coordinator."""

    def __init__(
        self,
        driver: RoundDriver,
        roster: Roster,
        registry: Registry,
        tokens: Tokens,
        federation: str,
        store: ArtifactStore,
        pool: ThreadPoolExecutor,
        turns: Turns,
        started_at: datetime,
        max_upload_bytes: int,
        ca_problems: Callable[[], list[str]],
        check_quota: Callable[[Plan], Awaitable[None]],
    ) -> None:
        self._driver = driver
        self._roster = roster
        self._registry = registry
        self._tokens = tokens
        self._federation = federation
        self._store = store
        self._pool = pool
        self._turns = turns
        self._started_at = started_at
        self._max_upload_bytes = max_upload_bytes
        self._ca_problems = ca_problems
        self._check_quota = check_quota

    async def WhoAmI(  # noqa: N802
        self, request: admin_pb2.WhoAmIRequest, context: Any
    ) -> admin_pb2.WhoAmIReply:
        """Say who is calling."""
        caller = caller_of(context)
        return admin_pb2.WhoAmIReply(
            federation=caller.federation,
            role=caller.role,
            id=caller.id,
            serial=caller.serial,
            not_after=caller.not_after.isoformat(),
            roles=sorted(roles_of_call() & set(GRANTABLE)),
        )

    async def GetStatus(  # noqa: N802
        self, request: admin_pb2.GetStatusRequest, context: Any
    ) -> admin_pb2.GetStatusReply:
        """The federation at a glance."""
        sites = self._sites()
        active = self._driver.active()
        problems = [f"site {s.id} is not connected" for s in sites if s.enabled and not s.connected]
        problems += [f"site {s.id}: {s.unavailable_reason}" for s in sites if s.unavailable_reason]
        problems += self._ca_problems()
        return admin_pb2.GetStatusReply(
            federation=self._federation,
            software_version=software_version(),
            uptime_s=(datetime.now(UTC) - self._started_at).total_seconds(),
            sites=sites,
            active_runs=[self._message(view) for view in self._driver.views() if view is active],
            artifact_bytes=self._store.size_bytes(),
            free_bytes=shutil.disk_usage(self._store.root).free,
            problems=problems,
        )

    async def CreateToken(  # noqa: N802
        self, request: admin_pb2.CreateTokenRequest, context: Any
    ) -> admin_pb2.CreateTokenReply:
        """Make a single-use enrolment token."""
        caller = caller_of(context).id
        new = await self._tokens.create(request.site, request.ttl_s or TOKEN_TTL_S, caller)
        note(f"site/{request.site}", expires_at=new.expires_at.isoformat(timespec="seconds"))
        return admin_pb2.CreateTokenReply(
            token=new.token,
            ca_fingerprint=new.ca_fingerprint,
            coordinator=new.coordinator,
            expires_at=new.expires_at.isoformat(timespec="seconds"),
        )

    async def ListSites(  # noqa: N802
        self, request: admin_pb2.ListSitesRequest, context: Any
    ) -> admin_pb2.ListSitesReply:
        """All sites, or the one asked for."""
        sites = self._sites(removed=request.removed or bool(request.site))
        if request.site:
            sites = [site for site in sites if site.id == request.site]
            if not sites:
                raise NotFoundError(
                    f"no site {request.site[:80]!r}", hint="`fedctl site list` shows all sites"
                )
        return admin_pb2.ListSitesReply(sites=sites)

    async def SubmitRun(  # noqa: N802
        self, request: admin_pb2.SubmitRunRequest, context: Any
    ) -> admin_pb2.SubmitRunReply:
        """Validate a plan and queue it."""
        _check_submission(request)
        plan = parse_plan(request.plan_toml)
        load_strategy(plan)
        self._check_sites(plan.sites or ())
        initial, digest = plan.training.initial, None
        if initial is not None:
            digest = request.initial_digest or self._best_model(initial)
            if digest not in self._store:
                raise NotFoundError(f"plan: initial model {initial!r:.80} is not stored here")
            plan = plan.model_copy(update={"training": plan.training.model_copy(update={"initial": digest})})
        with self._driver.promised(digest):
            if not self._submitted(request.request_id):
                await self._check_quota(plan)
            run = await self._driver.submit(
                plan, request_id=request.request_id or None, by=caller_of(context).id
            )
        note(f"run/{run}", strategy=plan.strategy, rounds=plan.rounds)
        return admin_pb2.SubmitRunReply(run=run)

    async def ListRuns(  # noqa: N802
        self, request: admin_pb2.ListRunsRequest, context: Any
    ) -> admin_pb2.ListRunsReply:
        """All runs, the newest first."""
        views = self._driver.views()[::-1]
        if request.page_token:
            last = self._driver.view(request.page_token)
            views = list(itertools.dropwhile(lambda view: view is not last, views))[1:]
        runs, rest = page(((view.state.run, self._message(view)) for view in views), _bytes)
        return admin_pb2.ListRunsReply(runs=runs, next_page_token=rest)

    async def GetRun(  # noqa: N802
        self, request: admin_pb2.GetRunRequest, context: Any
    ) -> admin_pb2.Run:
        """One run."""
        return self._message(self._driver.view(request.run))

    async def WatchRun(  # noqa: N802
        self, request: admin_pb2.GetRunRequest, context: Any
    ) -> AsyncIterator[admin_pb2.Run]:
        """One run, again after every change, until it is over."""
        last = None
        async for view in self._driver.watch(request.run):
            message = self._message(view)
            if message != last:
                yield message
                last = message

    async def PauseRun(  # noqa: N802
        self, request: admin_pb2.ControlRunRequest, context: Any
    ) -> admin_pb2.Run:
        """Open no further round."""
        note(f"run/{request.run}")
        view = self._driver.view(request.run)
        note(f"run/{view.state.run}")
        _check_not_over(view, "pause")
        if view.state.status is Status.QUEUED:
            raise ConflictError(f"run {view.state.run} is queued; there is nothing to pause yet")
        if view.state.pause_requested:
            raise ConflictError(f"run {view.state.run} is paused already, or will be after this round")
        await self._driver.post(
            view.state.run, ev.PauseRequested(at=self._driver.wall(), by=caller_of(context).id)
        )
        return self._message(view)

    async def ResumeRun(  # noqa: N802
        self, request: admin_pb2.ControlRunRequest, context: Any
    ) -> admin_pb2.Run:
        """Go on after a pause."""
        note(f"run/{request.run}")
        view = self._driver.view(request.run)
        note(f"run/{view.state.run}")
        _check_not_over(view, "resume")
        if not view.state.pause_requested:
            raise ConflictError(f"run {view.state.run} is not paused: it is {view.state.status}")
        await self._driver.post(
            view.state.run, ev.ResumeRequested(at=self._driver.wall(), by=caller_of(context).id)
        )
        return self._message(view)

    async def AbortRun(  # noqa: N802
        self, request: admin_pb2.ControlRunRequest, context: Any
    ) -> admin_pb2.Run:
        """End a run now; sites stop what they do for it."""
        why = printable(request.reason, _MAX_REASON)
        note(f"run/{request.run}", reason=why)
        view = self._driver.view(request.run)
        note(f"run/{view.state.run}")
        _check_not_over(view, "abort")
        reason = f"aborted by {caller_of(context).id}" + (f": {why}" if why else "")
        event = ev.RunFinished(at=self._driver.wall(), status="ABORTED", reason=reason)
        await self._driver.post(view.state.run, event)
        return self._message(view)

    async def ListRounds(  # noqa: N802
        self, request: admin_pb2.ListRoundsRequest, context: Any
    ) -> admin_pb2.ListRoundsReply:
        """Records of the finished rounds."""
        after = token_number(request.page_token)
        records = self._driver.view(request.run).state.records
        lines = ((str(r.round), r.record_json()) for r in records if r.round > after)
        found, rest = page(lines, lambda line: len(line.encode()))
        return admin_pb2.ListRoundsReply(records_json=found, next_page_token=rest)

    async def ListModels(  # noqa: N802
        self, request: admin_pb2.ListModelsRequest, context: Any
    ) -> admin_pb2.ListModelsReply:
        """The global model of every finished round; of every run if none is named. Dropped ones where asked for."""
        views = [self._driver.view(request.run)] if request.run else self._driver.views()
        models, rest = page(self._models(views, request.page_token, request.dropped), _bytes)
        return admin_pb2.ListModelsReply(models=models, next_page_token=rest)

    async def Download(  # noqa: N802
        self, request: admin_pb2.DownloadRequest, context: Any
    ) -> AsyncIterator[Any]:
        """Stream a model of a finished round, or one that a run started from; impressions, to those who may see them."""
        note(f"artifact/{request.digest}", offset=request.offset)
        states = [view.state for view in self._driver.views()]
        purpose = ""
        if any(has_model(state, request.digest) for state in states):
            purpose = "model"
        elif request.digest and any(state.plan.training.initial == request.digest for state in states):
            purpose = "initial model"
        elif any(request.digest in kept(state).values() for state in states):
            purpose = "impressions"
            roles = roles_of_call()
            if not roles & IMPRESSION_ROLES:
                raise denied(caller_of(context), "may not see impressions", IMPRESSION_ROLES, roles)
        if not purpose:
            raise_if_purged(states, request.digest)
            raise_if_dropped(states, request.digest)
            raise NotFoundError(f"no model or impressions {request.digest[:64]!r}")
        path = self._store.find(request.digest)
        note(purpose=purpose, bytes=read_manifest(path)[0].payload_bytes)
        async for part in stream_artifact(path, request.digest, request.offset, self._pool, self._turns):
            yield part

    async def UploadModel(  # noqa: N802
        self, request_iterator: AsyncIterator[tensor_pb2.ArtifactPart], context: Any
    ) -> admin_pb2.UploadModelReply:
        """Store a model that a plan starts from."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("part") != "manifest":
            raise ProtocolError("an upload must begin with a manifest")
        who = f"operator {caller_of(context).id}"
        if first.manifest.payload_bytes > self._max_upload_bytes:
            raise TransferError(
                f"{who}: a model of {first.manifest.payload_bytes} bytes, expected at most {self._max_upload_bytes}",
                hint="the limit is spool_mib of [limits] in fedserver.toml",
            )
        digest = await receive_model(first.manifest, _chunks(request_iterator), self._store, self._pool, who)
        note(f"artifact/{digest}", purpose="initial model")
        return admin_pb2.UploadModelReply(digest=digest)

    def _models(
        self, views: list[RunView], token: str, dropped: bool
    ) -> Iterator[tuple[str, admin_pb2.Model]]:
        """Models that are stored, and with `dropped` those that were, each with its token, "RUN/ROUND"; those that follow
        `token`, if there is one.
        """
        run, _, number = token.rpartition("/")
        after = token_number(number)
        if token:
            last = self._driver.view(run)
            views = list(itertools.dropwhile(lambda view: view is not last, views))
        for view in views:
            for record in view.state.records:
                if view.state.run == run and record.round <= after:
                    continue
                gone = record.round in view.state.dropped
                shown = dropped if gone else record.model in self._store
                if shown:
                    path = self._store.path(record.model)
                    size = 0 if gone else read_manifest(path)[0].payload_bytes
                    yield f"{view.state.run}/{record.round}", model_message(view.state, record.record(), size)

    def _check_sites(self, named: tuple[str, ...]) -> None:
        """Raise PlanError unless all sites that a plan names may be asked."""
        known = {row.id: row for row in self._registry.sites()}
        for site in named:
            if site not in known:
                raise PlanError(
                    f"plan: site '{site}' is not enrolled", hint="`fedctl site list` shows all sites"
                )
            if not known[site].enabled:
                raise PlanError(
                    f"plan: site '{site}' is {known[site].decision}",
                    hint=f"leave it out of 'sites', or let it in again: fedctl site enable {site}",
                )

    def _submitted(self, request_id: str) -> bool:
        """Whether this very request has made a run already."""
        known = (view.submission.request_id for view in self._driver.views())
        return bool(request_id) and request_id in known

    def _best_model(self, run: str) -> str:
        state = self._driver.view(run).state
        if state.best is None:
            raise NotFoundError(f"plan: run {state.run} has no finished round to start from")
        return state.best.model

    def _message(self, view: RunView) -> admin_pb2.Run:
        return run_message(view, self._roster, self._driver.waiting_for(view))

    def _sites(self, *, removed: bool = False) -> list[admin_pb2.Site]:
        states = [view.state for view in self._driver.views()]
        rows = self._registry.sites(removed=removed)
        return [site_message(row, self._roster, states) for row in rows]


def _check_not_over(view: RunView, what: str) -> None:
    state = view.state
    if state.status.final:
        raise ConflictError(f"run {state.run} is over ({state.status}): there is nothing to {what}")


def _check_submission(request: admin_pb2.SubmitRunRequest) -> None:
    size = len(request.plan_toml.encode())
    if size > MAX_PLAN_BYTES:
        raise PlanError(f"plan: {size} bytes of TOML, expected at most {MAX_PLAN_BYTES} (1 MiB)")
    if len(request.request_id) > _MAX_REQUEST_ID:
        raise ProtocolError(
            f"request id of {len(request.request_id)} characters, expected at most {_MAX_REQUEST_ID}"
        )


def _bytes(message: admin_pb2.Run | admin_pb2.Model) -> int:
    return message.ByteSize()


async def _chunks(parts: AsyncIterator[tensor_pb2.ArtifactPart]) -> AsyncIterator[tuple[int, bytes]]:
    async for part in parts:
        if part.WhichOneof("part") != "chunk":
            raise ProtocolError("expected a chunk, got a second manifest")
        yield part.chunk.offset, part.chunk.data
