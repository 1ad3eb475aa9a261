"""Runs the federation: takes facts in, journals them, and makes what is under way equal to what the machine asks for.

One task owns all run states. Facts are posted to its mailbox; a batch of them is applied, completed by the machine's own
decisions, written in one transaction, and only then answered and acted upon. So nothing is acknowledged or started that a
crash could undo.
"""

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog

from fedcore.artifact_store import ArtifactStore
from fedcore.clock import Clock
from fedcore.errors import ConflictError, FedimpresError, NotFoundError, StorageError
from fedcore.memory import give_back_freed
from fedcore.plan import Plan
from fedserver import round_events as ev
from fedserver.assigning import Assigning
from fedserver.compute_work import ComputeCommand, ComputeWork
from fedserver.drain import Drain
from fedserver.event_log import log_event
from fedserver.journal import Journal, Submission
from fedserver.looks import Looks
from fedserver.retention import drop_refused, erase_dropped, erase_purged, sweep
from fedserver.roster import Roster
from fedserver.round_decisions import Withheld, World, concerned, decide, waiting_for
from fedserver.round_machine import apply
from fedserver.round_state import RunState, Stage, Status, needed, superseded
from fedserver.round_work import SiteCommand, needed_by, task_of, work

_TICK_S = 0.25
_RETRY_S = 5.0
# When a run ends, artifacts this old that no run needs are left-overs.
_SWEEP_GRACE_S = 3600.0
log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Posted:
    run: str
    event: ev.Event
    done: asyncio.Future[RunState]


@dataclass(slots=True)
class RunView:
    """A run as the services see it. `stage_since` is monotonic, `compute` what the compute process last said."""

    submission: Submission
    state: RunState
    stage_since: float
    stage_since_wall: float
    compute: dict[str, Any] = field(default_factory=dict)
    stage_key: tuple[Stage, int, int] | None = None


class RoundDriver:
    """The one owner of run states. `serve` must run for anything to move."""

    def __init__(
        self,
        journal: Journal,
        store: ArtifactStore,
        roster: Roster,
        compute: ComputeWork,
        clock: Clock,
        sites_to_expect: Callable[[Plan], tuple[str, ...]],
        synthesises: Callable[[Plan], bool],
        withheld: Callable[[], Mapping[str, Withheld]],
    ) -> None:
        self._journal = journal
        self._store = store
        self._roster = roster
        self._compute = compute
        self._clock = clock
        self._sites_to_expect = sites_to_expect
        self._synthesises = synthesises
        self._withheld = withheld
        self._views: dict[str, RunView] = {}
        self._mailbox: asyncio.Queue[_Posted | None] = asyncio.Queue()
        self._computing: dict[ComputeCommand, asyncio.Task[None]] = {}
        self._changed = asyncio.Condition()
        # How often something has changed: whoever looks at runs sees by it what came meanwhile.
        self.changes = 0
        self.sent_bytes = self._sent_before_round = 0
        self._drain: Drain | None = None
        self._assigning = Assigning(roster, store, clock, self._state_of)
        self._looks = Looks()
        # Models that a run which is just being submitted starts from.
        self._promised: list[str] = []
        # When each fact that is not durable yet was posted.
        self._unrecorded: dict[asyncio.Future[RunState], float] = {}

    # -- what the services ask ------------------------------------------------------------------

    def recover(self) -> None:
        """Replay the journal. Call once, before `serve`."""
        for submission, state in self._journal.replay():
            self._views[submission.run] = self._new_view(submission, state)
        states = [view.state for view in self._views.values()]
        erase_purged(self._store, states)
        erase_dropped(self._store, states)

    def views(self) -> list[RunView]:
        """All runs, the oldest first."""
        return list(self._views.values())

    def view(self, run: str) -> RunView:
        """A run by its id or a unique beginning of it. Raises NotFoundError, ConflictError."""
        if run in self._views:
            return self._views[run]
        matches = [known for known in self._views if run and known.startswith(run)]
        if not matches:
            raise NotFoundError(f"no run {run[:80]!r}", hint="`fedctl run list` shows all runs")
        if len(matches) > 1:
            raise ConflictError(
                f"{run[:80]!r} is the beginning of {len(matches)} runs: {', '.join(sorted(matches)[:5])}"
            )
        return self._views[matches[0]]

    def _state_of(self, run: str) -> RunState | None:
        view = self._views.get(run)
        return view.state if view is not None else None

    def active(self) -> RunView | None:
        """The run that has left the queue and is not over."""
        for view in self._views.values():
            if view.state.status is not Status.QUEUED and not view.state.status.final:
                return view
        return None

    @property
    def draining(self) -> Drain | None:
        """The drain in force."""
        return self._drain

    def drain(self, drain: Drain | None) -> None:
        """Open no further round until called with None; what is under way is finished. Connected agents are told."""
        self._drain = drain
        if drain is not None:
            for session in self._roster.sessions.values():
                session.send(drain.directive())
        elif (view := self.active()) is not None and view.state.stage is Stage.OPENING:
            view.stage_since = self._clock.monotonic()  # the drain is no waiting for sites
        self.nudge()

    def under_way(self) -> str:
        """What a stop would interrupt, in words; empty if nothing."""
        view = self.active()
        if view is None or not work(view.state):
            return ""
        return f"run {view.state.run}, round {view.state.finished + 1}: {view.state.stage}"

    def journal_lag_s(self) -> float:
        """Seconds that the oldest fact has waited to become durable; 0 if none waits."""
        oldest = min(self._unrecorded.values(), default=None)
        return 0.0 if oldest is None else self._clock.monotonic() - oldest

    def waiting_for(self, view: RunView) -> str:
        """What a run waits for, in words."""
        if view.state.status is Status.QUEUED and self._drain is not None:
            return self._drain.says
        return waiting_for(view.state, self._world(view))

    async def submit(self, plan: Plan, *, request_id: str | None, by: str) -> str:
        """Queue a run; the same request id gives the same run. Returns its id. Raises as `Journal.submit`."""
        # Once it is recorded it must be known here, also if whoever asked has gone.
        return await asyncio.shield(self._submit(plan, request_id, by))

    @contextlib.contextmanager
    def promised(self, digest: str | None) -> Iterator[None]:
        """Delete no artifact of this digest meanwhile: a run that is being submitted starts from it."""
        found = [digest] if digest else []
        self._promised.extend(found)
        try:
            yield
        finally:
            for one in found:
                self._promised.remove(one)

    async def _submit(self, plan: Plan, request_id: str | None, by: str) -> str:
        run = f"{plan.name}-{secrets.token_hex(4)}"
        with self.promised(plan.training.initial):
            submission = await self._journal.submit(run, plan, request_id=request_id, submitted_by=by)
        if submission.run not in self._views:  # new, or recorded by a call that was cut before it came here
            state = RunState(run=submission.run, plan=submission.plan)
            self._views[submission.run] = self._new_view(submission, state)
            log.info("run submitted", run=submission.run, by=by, strategy=plan.strategy, rounds=plan.rounds)
            self._mailbox.put_nowait(None)
        return submission.run

    async def post(self, run: str, event: ev.Event) -> RunState:
        """Journal and apply a fact; returns the state once it is durable. Raises NotFoundError, ConflictError."""
        if run not in self._views:
            raise NotFoundError(f"no run {run[:80]!r}", hint="`fedctl run list` shows all runs")
        done: asyncio.Future[RunState] = asyncio.get_running_loop().create_future()
        self._mailbox.put_nowait(_Posted(run, event, done))
        self._unrecorded[done] = self._clock.monotonic()
        try:
            return await done
        finally:
            del self._unrecorded[done]

    async def wait_changed(self, timeout_s: float) -> None:
        """Return when some run changed, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait()

    def nudge(self) -> None:
        """Look again: somebody connected, left or moved."""
        if self._mailbox.empty():
            self._mailbox.put_nowait(None)

    def wall(self) -> float:
        """Seconds since the epoch, for events."""
        return self._clock.wall()

    def readable_by(self, site: str, digest: str) -> Path:
        """Path of an artifact that the site's present work needs. Raises NotFoundError for any other."""
        view = self.active()
        if view is not None and digest in needed_by(view.state, site):
            return self._store.find(digest)
        raise NotFoundError(f"{site}: artifact {digest[:64]!r} is not part of its present work")

    def count_down(self, sent_bytes: int) -> None:
        """Count bytes sent to sites."""
        self.sent_bytes += sent_bytes

    # -- the loop -------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Drive runs until cancelled; compute commands in progress are withdrawn then."""
        try:
            while True:
                posted = await self._next_batch()
                await self._settle(posted)
        finally:
            for task in self._computing.values():
                task.cancel()
            await asyncio.gather(*self._computing.values(), return_exceptions=True)

    async def _next_batch(self) -> list[_Posted]:
        batch: list[_Posted] = []
        try:
            async with asyncio.timeout(self._looks.patience_s(_TICK_S)):
                first = await self._mailbox.get()
        except TimeoutError:
            return batch
        if first is not None:
            batch.append(first)
        while not self._mailbox.empty():
            following = self._mailbox.get_nowait()
            if following is not None:
                batch.append(following)
        return batch

    async def _settle(self, batch: list[_Posted]) -> None:
        states = {run: view.state for run, view in self._views.items()}
        recorded: list[tuple[str, ev.Event]] = []
        answers: list[_Posted] = []
        for posted in batch:
            try:
                states[posted.run] = self._apply(states, posted.run, posted.event)
            except FedimpresError as error:
                drop_refused(self._store, posted.event, states.values())
                _fail(posted.done, error)
                continue
            recorded.append((posted.run, posted.event))
            answers.append(posted)
        sites = self._concerned(states, recorded)
        if sites is None:
            self._looks.begin()
            self._decide(states, recorded)
        if recorded:
            try:
                await self._journal.append(recorded)
            except FedimpresError as error:
                log.error("journal can't be written", error=str(error))
                for posted in answers:
                    _fail(posted.done, error)
                return
            await self._publish(states, recorded)
            for posted in answers:
                if not posted.done.done():
                    posted.done.set_result(states[posted.run])
        if sites is None or sites:
            self._reconcile(sites)
        if sites is None:
            self._looks.end()

    def _concerned(
        self, states: dict[str, RunState], recorded: list[tuple[str, ev.Event]]
    ) -> frozenset[str] | None:
        """The sites that must be looked at now; None for all of them, and for what time brings."""
        if self._looks.due(_TICK_S):
            return None
        if not recorded:
            return frozenset() if self._looks.put_off() else None
        runs = {run for run, _ in recorded}
        if len(runs) > 1:
            return None
        return concerned(states[runs.pop()], [event for _, event in recorded])

    def _decide(self, states: dict[str, RunState], recorded: list[tuple[str, ev.Event]]) -> None:
        """Apply what follows until nothing does: of the active run, and of the next in the queue."""
        while True:
            run = next(
                (r for r, s in states.items() if s.status is not Status.QUEUED and not s.status.final), None
            )
            if run is None:
                run = next((r for r, s in states.items() if s.status is Status.QUEUED), None)
                if run is None or self._drain is not None:
                    return
                events: tuple[ev.Event, ...] = (self._start(states[run].plan),)
            else:
                events = decide(states[run], self._world(self._views[run], states[run]))
            if not events:
                return
            for event in events:
                states[run] = self._apply(states, run, event)
                recorded.append((run, event))

    def _apply(self, states: dict[str, RunState], run: str, event: ev.Event) -> RunState:
        state = apply(states[run], event)
        view, key = self._views[run], _stage_key(state)
        if key != view.stage_key:
            view.stage_key = key
            view.stage_since, view.stage_since_wall = self._clock.monotonic(), self._clock.wall()
            view.compute = {}
        return state

    def _start(self, plan: Plan) -> ev.Event:
        sites = self._sites_to_expect(plan)
        if len(sites) < plan.min_sites:
            reason = f"min_sites is {plan.min_sites}, but only {len(sites)} sites are enrolled and enabled"
            return ev.RunFinished(at=self._clock.wall(), status="FAILED", reason=reason)
        try:
            synthesises = self._synthesises(plan)
        except FedimpresError as error:  # its plug-in was uninstalled while it was queued, say
            return ev.RunFinished(at=self._clock.wall(), status="FAILED", reason=str(error))
        return ev.RunStarted(at=self._clock.wall(), sites=sites, synthesises=synthesises)

    def _world(self, view: RunView, state: RunState | None = None) -> World:
        state = state or view.state
        unable = {site: session.unable(state) for site, session in self._roster.sessions.items()}
        return World(
            now=self._clock.monotonic(),
            wall=self._clock.wall(),
            stage_since=view.stage_since,
            sites=self._roster.presence(unable, self._withheld()),
            bytes_down=self.sent_bytes - self._sent_before_round,
            held=self._drain.says if self._drain is not None else "",
        )

    async def _publish(self, states: dict[str, RunState], recorded: list[tuple[str, ev.Event]]) -> None:
        for run, event in recorded:
            log_event(run, event)
            if isinstance(event, ev.RoundOpened):
                self._sent_before_round = self.sent_bytes
                self._assigning.tell_parked(states[run])
        touched = dict.fromkeys(run for run, _ in recorded)
        before = {run: self._views[run].state for run in touched}
        for run in touched:  # all of them first: what one run gives up another may just have begun to need
            self._views[run].state = states[run]
        for digest, run in list(self._compute.unrecorded.items()):
            if run in touched and (states[run].status.final or digest in needed(states[run])):
                del self._compute.unrecorded[digest]
        for run in touched:
            self._discard(before[run], states[run])
            if states[run].status.final and not before[run].status.final:
                give_back_freed()
                sweep(self._store, [other.state for other in self._views.values()], _SWEEP_GRACE_S)
        if any(isinstance(event, ev.ImpressionsPurged) for _, event in recorded):
            erase_purged(self._store, [view.state for view in self._views.values()])
        self.changes += 1
        async with self._changed:
            self._changed.notify_all()

    def _new_view(self, submission: Submission, state: RunState) -> RunView:
        view = RunView(submission, state, self._clock.monotonic(), self._clock.wall())
        if state.status is not Status.QUEUED:
            view.stage_key = _stage_key(state)
        return view

    def discard_unneeded(self, digest: str) -> None:
        """Delete an artifact that came too late, unless some run needs the same bytes."""
        if not any(digest in needed(view.state) for view in self._views.values()):
            self._store.delete(digest)

    def _discard(self, before: RunState, after: RunState) -> None:
        """Delete what a round that is over has superseded, unless some run still needs the same bytes."""
        obsolete = superseded(before, after)
        if obsolete:
            obsolete -= {digest for view in self._views.values() for digest in needed(view.state)}
            obsolete.difference_update(self._compute.unrecorded)
            obsolete.difference_update(self._promised)
        for digest in sorted(obsolete):
            self._store.delete(digest)

    # -- making it so ---------------------------------------------------------------------------

    def _reconcile(self, sites: frozenset[str] | None) -> None:
        """Make what is under way equal to what the active run asks for; of `sites` alone if some are given."""
        view = self.active()
        state = view.state if view is not None else None
        wanted = work(state) if state is not None and sites is None else ()
        try:
            if sites is None:
                by_site = {command.site: command for command in wanted if isinstance(command, SiteCommand)}
                self._assigning.assign(list(self._roster.sessions), state, by_site)
            elif state is not None:
                tasks = {site: asked for site in sites if (asked := task_of(state, site)) is not None}
                self._assigning.assign(sites, state, tasks)
        except FedimpresError as error:  # what the sites should fetch is missing or damaged on our disk
            assert view is not None
            self._give_up(view, error)
            return
        if sites is not None:
            return
        computing = {command for command in wanted if not isinstance(command, SiteCommand)}
        for command, task in self._computing.items():
            if command not in computing and not task.cancelling():
                task.cancel()
        for command in computing - set(self._computing):
            assert view is not None
            performing = asyncio.create_task(self._perform(view, command), name=type(command).__name__)
            self._computing[command] = performing

    def _give_up(self, view: RunView, error: FedimpresError) -> None:
        """End a run that can't go on, and leave the coordinator to the others."""
        log.error("run can't go on", run=view.state.run, error=str(error))
        event = ev.RunFinished(at=self._clock.wall(), status="FAILED", reason=str(error))
        done: asyncio.Future[RunState] = asyncio.get_running_loop().create_future()
        done.add_done_callback(lambda future: future.exception())
        self._mailbox.put_nowait(_Posted(view.state.run, event, done))

    async def _perform(self, view: RunView, command: ComputeCommand) -> None:
        def said(fields: dict[str, Any]) -> None:
            view.compute.update(fields)  # the dictionary that is there now: a new stage begins a new one

        run, initial = view.state.run, view.state.plan.training.initial
        limit_s = view.state.plan.limits.round_deadline_s
        try:
            async with asyncio.timeout(limit_s):
                event = await self._compute.perform(view.state, command, initial, said)
            await self.post(run, event)
        except TimeoutError:
            await self._tell_failure(run, command, f"it took longer than round_deadline_s = {limit_s:g} s")
        except ConflictError as error:
            log.info("result came too late", run=run, error=error.message)
        except (
            StorageError
        ) as error:  # a full disk, say: what was computed is computed again once there is room
            log.error("result can't be stored, trying again", run=run, error=str(error), in_s=_RETRY_S)
            await asyncio.sleep(_RETRY_S)
        except Exception as error:
            log.exception("compute command failed unexpectedly", run=run, command=type(command).__name__)
            await self._tell_failure(run, command, f"{type(error).__name__}: {error}")
        finally:
            self._computing.pop(command, None)
            self.nudge()

    async def _tell_failure(self, run: str, command: ComputeCommand, reason: str) -> None:
        try:
            await self.post(run, self._compute.failed(command, reason))
        except ConflictError:
            return  # the run went on without it
        except FedimpresError:
            await asyncio.sleep(_RETRY_S)  # nothing can be recorded: no hot loop

    # -- streams --------------------------------------------------------------------------------

    async def watch(self, run: str) -> AsyncIterator[RunView]:
        """The run now and after every change or a second, until it is over."""
        view = self.view(run)
        while True:
            yield view
            if view.state.status.final:
                return
            await self.wait_changed(1.0)


def _stage_key(state: RunState) -> tuple[Stage, int, int]:
    """Changes when the run enters another stage."""
    return state.stage, state.finished, state.attempts


def _fail(future: asyncio.Future[RunState], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
