"""Keeps the agent connected for ever, and does what the directives say.

One connection at a time: hello, then the directive stream. A task outlives connections: it goes on while the agent
reconnects, and its result is delivered over whatever connection there is then.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable, Iterable

import structlog

from fedagent import agent_machine as machine
from fedagent.agent_machine import AgentState, Begin, Task, Withdraw
from fedagent.tasks import Tasks
from fedcore.errors import FedimpresError, UnreachableError
from fedcore.protocol import PROTOCOL, SESSION_KEY
from fedcore.status import from_rpc_error
from fedcore.text import wire_text
from fedcore.v1 import federation_pb2, federation_pb2_grpc
from fedcore.version import software_version

# isort: split
import grpc

_FIRST_BACKOFF_S = 0.5
_STEADY_AFTER_S = 30.0
_DESCRIBE_AGAIN_S = 60.0
_OUTBOX_DEPTH = 256
log = structlog.get_logger(__name__)

Channel = grpc.aio.Channel
Directive = federation_pb2.Directive


class AgentDriver:
    """The agent's control loop. `serve` runs until it is cancelled."""

    def __init__(
        self, site: str, open_channel: Callable[[], Channel], max_backoff_s: float, threads: int
    ) -> None:
        self._site = site
        self._open_channel = open_channel
        self._max_backoff_s = max_backoff_s
        self._threads = threads
        self._tasks: Tasks | None = None
        self._capabilities = federation_pb2.Capabilities()
        self._channel: Channel | None = None
        self._outbox: asyncio.Queue[federation_pb2.AgentMessage] = asyncio.Queue(_OUTBOX_DEPTH)
        self._state = AgentState()
        self._directives: dict[Task, Directive] = {}
        self._work: dict[Task, asyncio.Task[None]] = {}

    def stub(self) -> "federation_pb2_grpc.FederationAsyncStub":
        """The Federation service over the present connection. Raises UnreachableError while there is none."""
        if self._channel is None:
            raise UnreachableError("not connected to the coordinator")
        return federation_pb2_grpc.FederationStub(self._channel)

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
        self._capabilities = await self._describe()
        describer = asyncio.create_task(self._describe_again())
        backoff_s = _FIRST_BACKOFF_S
        loop = asyncio.get_running_loop()
        try:
            while True:
                began = loop.time()
                try:
                    await self._connect_once()
                    reason = "the coordinator ended the stream"
                except grpc.RpcError as error:
                    reason = str(from_rpc_error(error, "coordinator"))
                except FedimpresError as error:
                    reason = str(error)
                if loop.time() - began > _STEADY_AFTER_S:
                    backoff_s = _FIRST_BACKOFF_S
                wait_s = backoff_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
                log.warning("not connected", site=self._site, reason=reason, again_in_s=round(wait_s, 1))
                await asyncio.sleep(wait_s)
                backoff_s = min(2 * backoff_s, self._max_backoff_s)
        finally:
            describer.cancel()
            self._state = AgentState()  # so that what ends now begins nothing again
            for work in self._work.values():
                work.cancel()
            await asyncio.gather(describer, *self._work.values(), return_exceptions=True)

    async def _connect_once(self) -> None:
        async with self._open_channel() as channel:
            stub = federation_pb2_grpc.FederationStub(channel)
            hello = federation_pb2.HelloRequest(protocol=PROTOCOL, capabilities=self._capabilities)
            reply = await stub.Hello(hello)
            log.info(
                "connected", site=self._site, federation=reply.federation, coordinator=reply.software_version
            )
            self._channel = channel
            # What was said to a connection that is gone is dropped: the coordinator asks again for what it still
            # wants. A queue of its own for each connection: the reader of a dead one takes one message more.
            outbox = self._outbox = asyncio.Queue(_OUTBOX_DEPTH)
            try:
                stream = stub.Directives(
                    self._messages(outbox, reply.heartbeat_interval_s),
                    metadata=((SESSION_KEY, reply.session),),
                )
                async for directive in stream:
                    self._obey(directive)
            finally:
                self._channel = None

    async def _messages(
        self, outbox: asyncio.Queue[federation_pb2.AgentMessage], heartbeat_s: float
    ) -> AsyncIterator[federation_pb2.AgentMessage]:
        while True:
            try:
                yield await asyncio.wait_for(outbox.get(), heartbeat_s)
            except TimeoutError:
                yield federation_pb2.AgentMessage(heartbeat=federation_pb2.Heartbeat())

    def _obey(self, directive: Directive) -> None:
        match directive.WhichOneof("directive"):
            case "train":
                self._ask(Task("train", directive.train.run, directive.train.round), directive)
            case "evaluate":
                self._ask(Task("evaluate", directive.evaluate.run, directive.evaluate.round), directive)
            case "stop":
                log.info("told to stop", run=directive.stop.run, reason=directive.stop.reason)
                self._step(*machine.stopped(self._state, directive.stop.run))
            case "ping":
                self.send(federation_pb2.AgentMessage(pong=federation_pb2.Pong(nonce=directive.ping.nonce)))
            case "drain":
                log.info("the coordinator is about to stop", reason=directive.drain.reason)
            case _:
                log.warning("directive of an unknown kind ignored")

    def _ask(self, task: Task, directive: Directive) -> None:
        if not machine.is_run(task.run):
            log.error("directive refused: not a run's name", run=task.run[:200], kind=task.kind)
            self._fail(task, "the directive's run is not a run's name")
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
        directive = self._directives.pop(task)
        completed = False
        log.info("task begins", run=task.run, round=task.round, kind=task.kind)
        try:
            if task.kind == "train":
                await self._tasks.train(directive.train)
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
            again = self._state.wanted == task and not completed
            if again:
                self._directives.setdefault(task, directive)
            self._step(*machine.ended(self._state, task, completed=completed))

    def _fail(self, task: Task, reason: str) -> None:
        failed = federation_pb2.TaskFailed(
            run=task.run, round=task.round, reason=wire_text(reason, 2000), evaluating=task.kind == "evaluate"
        )
        self.send(federation_pb2.AgentMessage(failed=failed))

    async def _describe(self) -> federation_pb2.Capabilities:
        assert self._tasks is not None
        capabilities = await self._tasks.describe()
        capabilities.software_version = software_version()
        capabilities.threads = capabilities.threads or self._threads
        return capabilities

    async def _describe_again(self) -> None:
        """While the site can take no work, look again from time to time, and tell when that has changed."""
        while True:
            await asyncio.sleep(_DESCRIBE_AGAIN_S)
            if not self._capabilities.unavailable_reason:
                continue
            self._capabilities = await self._describe()
            if not self._capabilities.unavailable_reason:
                with contextlib.suppress(UnreachableError):
                    self.send(federation_pb2.AgentMessage(capabilities=self._capabilities))
