"""Keeps the agent connected for ever, and does what the directives say.

One connection at a time: hello, then the directive stream. A task outlives connections: it goes on while the agent
reconnects, and its result is delivered over whatever connection there is then.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable

import structlog

from fedagent import agent_machine as machine
from fedagent.agent_machine import AgentState, Begin, Task, Withdraw
from fedagent.audit import ControlBytes, SiteAudit
from fedagent.federation_stub import federation_stub
from fedagent.gate import SiteGate
from fedagent.purging import Purging
from fedagent.shared_log import SharedLog
from fedagent.status_file import StatusBoard
from fedagent.tasks import Tasks, inputs_of
from fedcore.errors import FedimpresError, ForeignCertificateError, TermError, UnreachableError
from fedcore.protocol import PROTOCOL, SESSION_KEY
from fedcore.status import from_rpc_error
from fedcore.text import wire_text
from fedcore.v1 import certificates_pb2_grpc, federation_pb2, federation_pb2_grpc
from fedcore.version import software_version

# isort: split
import grpc

_FIRST_BACKOFF_S = 0.5
_STEADY_AFTER_S = 30.0
_DESCRIBE_AGAIN_S = 60.0
_GATE_LOOK_S = 0.5
_OUTBOX_DEPTH = 256
log = structlog.get_logger(__name__)

Channel = grpc.aio.Channel
Directive = federation_pb2.Directive


class AgentDriver:
    """The agent's control loop. `serve` runs until it is cancelled."""

    def __init__(
        self,
        site: str,
        open_channel: Callable[[], Channel],
        max_backoff_s: float,
        threads: int,
        gate: SiteGate | None = None,
        board: StatusBoard | None = None,
        explain: Callable[[ForeignCertificateError], FedimpresError] = lambda error: error,
        *,
        audit: SiteAudit,
        shared_log: SharedLog | None = None,
        purging: Purging,
    ) -> None:
        self._site = site
        self._open_channel = open_channel
        self._max_backoff_s = max_backoff_s
        self._threads = threads
        self._gate = gate
        self._board = board
        self._explain = explain
        self._audit = audit
        self._shared_log = shared_log
        self._purging = purging
        self._purges: set[asyncio.Task[None]] = set()
        self._tasks: Tasks | None = None
        self._found = federation_pb2.Capabilities()
        self._refusal = ""
        self._channel: Channel | None = None
        self._outbox: asyncio.Queue[federation_pb2.AgentMessage] = asyncio.Queue(_OUTBOX_DEPTH)
        self._state = AgentState()
        self._directives: dict[Task, Directive] = {}
        # What the task in progress was begun with.
        self._present: Directive | None = None
        self._work: dict[Task, asyncio.Task[None]] = {}
        self._renewed = asyncio.Event()
        self._on_renewal_asked: Callable[[], None] = lambda: None

    def stub(self) -> "federation_pb2_grpc.FederationAsyncStub":
        """The Federation service over the present connection. Raises UnreachableError while there is none."""
        if self._channel is None:
            raise UnreachableError("not connected to the coordinator")
        return federation_stub(self._channel)

    def certificates(self) -> "certificates_pb2_grpc.CertificatesAsyncStub":
        """The Certificates service, as `stub`."""
        if self._channel is None:
            raise UnreachableError("not connected to the coordinator")
        return certificates_pb2_grpc.CertificatesStub(self._channel)

    @property
    def working(self) -> Task | None:
        """The task in progress."""
        return self._state.working

    def when_asked_to_renew(self, renew: Callable[[], None]) -> None:
        """Call `renew` when the coordinator asks for a renewal: the federation moves to another CA."""
        self._on_renewal_asked = renew

    def reconnect(self) -> None:
        """Open the connection anew, at once: the credential was renewed. Tasks go on; transfers resume."""
        self._renewed.set()

    def send(self, message: federation_pb2.AgentMessage) -> None:
        """Queue a message. While nobody reads, progress is dropped; results never are."""
        if self._outbox.full():
            if message.WhichOneof("message") == "progress":
                return
            self._outbox.get_nowait()
        self._outbox.put_nowait(message)

    async def serve(self, tasks: Tasks) -> None:
        """Connect, work, reconnect, until cancelled."""
        self._tasks = tasks
        self._found = await self._describe()
        await self._look_at_gate()
        watchers = [asyncio.create_task(self._describe_again()), asyncio.create_task(self._watch_gate())]
        backoff_s = _FIRST_BACKOFF_S
        loop = asyncio.get_running_loop()
        try:
            while True:
                began = loop.time()
                self._renewed.clear()  # the channel opened now reads the newest credential
                failure = await self._connected_until()
                if self._renewed.is_set():
                    log.info("connecting with the renewed certificate", site=self._site)
                    backoff_s = _FIRST_BACKOFF_S
                    continue
                if loop.time() - began > _STEADY_AFTER_S:
                    backoff_s = _FIRST_BACKOFF_S
                wait_s = backoff_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
                log.warning(
                    "not connected",
                    site=self._site,
                    code=failure.code,
                    reason=str(failure),
                    again_in_s=round(wait_s, 1),
                )
                self._show(trouble=str(failure))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._renewed.wait(), wait_s)
                backoff_s = min(2 * backoff_s, self._max_backoff_s)
        finally:
            for watcher in watchers:
                watcher.cancel()
            self._state = AgentState()  # so that what ends now begins nothing again
            ending = [*self._work.values(), *self._purges]
            for work in ending:
                work.cancel()
            await asyncio.gather(*watchers, *ending, return_exceptions=True)

    async def _explained(self, failure: FedimpresError) -> FedimpresError:
        """The failure, or what a look at the line from below gRPC says of it."""
        if isinstance(failure, ForeignCertificateError):
            return await asyncio.to_thread(self._explain, failure)
        return failure

    async def _connected_until(self) -> FedimpresError:
        """Connect, work until the connection is over, and give the reason."""
        failure: FedimpresError
        try:
            await self._connect_once()
            failure = UnreachableError("the coordinator ended the stream")
        except grpc.RpcError as error:
            failure = await self._explained(from_rpc_error(error, "coordinator"))
        except FedimpresError as error:
            failure = error
        if isinstance(failure, TermError):
            with contextlib.suppress(FedimpresError):  # a log that can't be written ends no agent
                await self._audit.refused(failure)
        return failure

    async def _connect_once(self) -> None:
        async with self._open_channel() as channel:
            stub = federation_pb2_grpc.FederationStub(channel)
            hello = federation_pb2.HelloRequest(protocol=PROTOCOL, capabilities=self._capabilities())
            self._audit.introduce(hello)
            reply = await stub.Hello(hello)
            await self._audit.greeted(hello, reply)
            log.info(
                "connected", site=self._site, federation=reply.federation, coordinator=reply.software_version
            )
            self._channel = channel
            self._show(connected=True, trouble="")
            # What was said to a connection that is gone is dropped: the coordinator asks again for what it still
            # wants. A queue of its own for each connection: the reader of a dead one takes one message more.
            outbox = self._outbox = asyncio.Queue(_OUTBOX_DEPTH)
            self.send(await self._purging.holdings())
            told = ControlBytes()
            try:
                stream = stub.Directives(
                    self._messages(outbox, reply.heartbeat_interval_s, told),
                    metadata=((SESSION_KEY, reply.session),),
                )
                await self._read_until_renewed(stream)
            finally:
                self._channel = None
                self._show(connected=False)
                await self._audit.disconnected(told)

    async def _read_until_renewed(self, stream: AsyncIterable[Directive]) -> None:
        """Obey what comes, until the stream ends or a renewed certificate asks for a new connection."""

        async def read() -> None:
            async for directive in stream:
                self._obey(directive)

        reading, renewed = asyncio.create_task(read()), asyncio.create_task(self._renewed.wait())
        try:
            await asyncio.wait({reading, renewed}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
        finally:
            reading.cancel()
            renewed.cancel()
            await asyncio.gather(reading, renewed, return_exceptions=True)

    async def _messages(
        self, outbox: asyncio.Queue[federation_pb2.AgentMessage], heartbeat_s: float, told: ControlBytes
    ) -> AsyncIterator[federation_pb2.AgentMessage]:
        while True:
            try:
                message = await asyncio.wait_for(outbox.get(), heartbeat_s)
            except TimeoutError:
                message = federation_pb2.AgentMessage(heartbeat=federation_pb2.Heartbeat())
            match message.WhichOneof("message"):
                case "evaluation":
                    await self._audit.figures(message.evaluation)
                case "statistics":
                    await self._audit.statistics(message.statistics)
                case "log_lines":
                    await self._audit.log_lines(message.log_lines)
            told.add(message.ByteSize())
            yield message

    def _obey(self, directive: Directive) -> None:
        match directive.WhichOneof("directive"):
            case "train":
                train = directive.train
                self._ask(Task("train", train.run, train.round, inputs_of(train)), directive)
            case "recalibrate":
                measure = directive.recalibrate
                self._ask(Task("recalibrate", measure.run, measure.round, measure.model.digest), directive)
            case "evaluate":
                evaluate = directive.evaluate
                self._ask(Task("evaluate", evaluate.run, evaluate.round, evaluate.model.digest), directive)
            case "stop":
                log.info("told to stop", run=directive.stop.run, reason=directive.stop.reason)
                self._show(told=directive.stop.reason)
                self._step(*machine.stopped(self._state, directive.stop.run))
            case "ping":
                self.send(federation_pb2.AgentMessage(pong=federation_pb2.Pong(nonce=directive.ping.nonce)))
            case "read_log" if self._shared_log is not None:
                log.info("asked for the last lines of this log", asked_by=directive.read_log.asked_by)
                answer = self._shared_log.answer(directive.read_log)
                self.send(federation_pb2.AgentMessage(log_lines=answer))
            case "renew_certificate":
                log.info("asked to renew the certificate", site=self._site)
                self._on_renewal_asked()
            case "purge_impressions":
                purge = asyncio.create_task(self._purge(directive.purge_impressions))
                self._purges.add(purge)
                purge.add_done_callback(self._purges.discard)
            case "drain":
                log.info("the coordinator is about to stop", reason=directive.drain.reason)
            case _:
                log.warning("directive of an unknown kind ignored")

    async def _purge(self, order: federation_pb2.PurgeImpressions) -> None:
        """Take purged impressions from the task that uses them, delete them, and say so."""
        gone = set(order.digests)
        working, wanted = self._state.working, self._state.wanted
        uses = self._present is not None and _impressions_of(self._present) in gone
        work = self._work.get(working) if working is not None and uses else None
        newest = (self._directives.get(wanted) or self._present) if wanted is not None else None
        if wanted is not None and newest is not None and _impressions_of(newest) in gone:
            # The coordinator asks again, without them. If it has done so already, that task is the one wanted.
            self._step(*machine.stopped(self._state, wanted.run))
        if working is not None and work is not None:
            log.warning("task gives up purged impressions", run=working.run, round=working.round)
            await asyncio.gather(work, return_exceptions=True)
        answer = await self._purging.carry_out(order)
        if answer is not None:
            self.send(federation_pb2.AgentMessage(impressions_purged=answer))
            self.send(await self._purging.holdings())

    def _ask(self, task: Task, directive: Directive) -> None:
        if not machine.is_run(task.run):
            log.error("directive refused: not a run's name", run=task.run[:200], kind=task.kind)
            self._fail(task, "the directive's run is not a run's name")
            return
        if self._refusal:
            self._fail(task, self._refusal)
            return
        self._directives[task] = directive
        if task.kind == "train":
            started = federation_pb2.TaskStarted(run=task.run, round=task.round)
            self.send(federation_pb2.AgentMessage(started=started))
        self._step(*machine.asked(self._state, task))

    def _step(self, state: AgentState, actions: Iterable[Begin | Withdraw]) -> None:
        self._state = state
        for action in actions:
            if isinstance(action, Begin):
                self._work[action.task] = asyncio.create_task(self._perform(action.task))
            else:
                self._work[action.task].cancel()

    async def _perform(self, task: Task) -> None:
        assert self._tasks is not None
        directive = self._present = self._directives.pop(task)
        completed = False
        log.info("task begins", run=task.run, round=task.round, kind=task.kind)
        self._show(doing=f"{task.kind}, round {task.round} of run {task.run}", told="")
        try:
            if task.kind == "train":
                await self._tasks.train(directive.train)
            elif task.kind == "recalibrate":
                await self._tasks.recalibrate(directive.recalibrate)
            else:
                await self._tasks.evaluate(directive.evaluate)
            completed = True
        except Exception as error:
            # A bug, ours or a plug-in's. Begun again it would end the same way, at once and for ever.
            log.exception("task ended unexpectedly", run=task.run, round=task.round, kind=task.kind)
            self._fail(task, f"unexpected {type(error).__name__}; the site's log says more")
            completed = True
        finally:
            self._work.pop(task, None)
            self._present = None
            self._show(doing="")
            again = self._state.wanted == task and not completed
            if again:
                self._directives.setdefault(task, directive)
            self._step(*machine.ended(self._state, task, completed=completed))

    def _fail(self, task: Task, reason: str) -> None:
        failed = federation_pb2.TaskFailed(
            run=task.run,
            round=task.round,
            reason=wire_text(reason, 2000),
            evaluating=task.kind == "evaluate",
            recalibrating=task.kind == "recalibrate",
        )
        self.send(federation_pb2.AgentMessage(failed=failed))

    async def _describe(self) -> federation_pb2.Capabilities:
        assert self._tasks is not None
        capabilities = await self._tasks.describe()
        capabilities.software_version = software_version()
        capabilities.threads = capabilities.threads or self._threads
        return capabilities

    def _capabilities(self) -> federation_pb2.Capabilities:
        """What the coordinator is told: what was found here, and that no work is taken if none is."""
        said = federation_pb2.Capabilities()
        said.CopyFrom(self._found)
        said.knows_read_log = self._shared_log is not None
        said.knows_recalibrate = True
        said.unavailable_reason = wire_text(self._refusal, 1000) or self._found.unavailable_reason
        return said

    async def _describe_again(self) -> None:
        """While the site can take no work, look again from time to time, and tell when that has changed."""
        while True:
            await asyncio.sleep(_DESCRIBE_AGAIN_S)
            if not self._found.unavailable_reason:
                continue
            self._found = await self._describe()
            if not self._found.unavailable_reason:
                self.send(federation_pb2.AgentMessage(capabilities=self._capabilities()))

    async def _watch_gate(self) -> None:
        while True:
            await asyncio.sleep(_GATE_LOOK_S)
            await self._look_at_gate()

    async def _look_at_gate(self) -> None:
        """Hold to what the site's own people say now: give up the work that they no longer want, and tell why."""
        if self._gate is None:
            return
        found = self._found
        refusal = self._gate.refusal(None if found.unavailable_reason else found.num_examples)
        if refusal == self._refusal:
            return
        self._refusal = refusal
        log.info("this site takes no work" if refusal else "this site takes work", reason=refusal)
        self._show(refusal=refusal)
        self.send(federation_pb2.AgentMessage(capabilities=self._capabilities()))
        if refusal:
            await self._give_up_work(refusal)

    async def _give_up_work(self, reason: str) -> None:
        tasks = {task for task in (self._state.working, self._state.wanted) if task is not None}
        self._step(*machine.stopped(self._state, ""))
        await asyncio.gather(*self._work.values(), return_exceptions=True)
        for task in tasks:
            self._directives.pop(task, None)
            self._fail(task, reason)
        assert self._tasks is not None
        await self._tasks.release()

    def _show(self, **changes: object) -> None:
        if self._board is not None:
            self._board.update(**changes)


def _impressions_of(directive: Directive) -> str:
    """Digest of the bank that a directive trains on; "" for none."""
    return directive.train.impressions.digest
