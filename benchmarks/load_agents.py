"""Light agents, many in one process: they speak an agent's whole protocol and train nothing. A helper of load.py.

load_agents.py FILE FIRST COUNT ECHO_ADDRESS    the sites number FIRST to FIRST + COUNT of FILE (see `write_members`)

Each line of stdin is a command, answered by a line of JSON on stdout:

connect     every agent says hello and opens its directive stream, over a connection of its own
echo        as many streams to the bare echo server, over connections of their own
end         close all; tells what became of the agents
"""

import asyncio
import contextlib
import hashlib
import json
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from echo_server import METHOD

from fedagent.federation_stub import federation_stub
from fedcore.channel import open_channel
from fedcore.credential import Credential
from fedcore.identity import subject_of
from fedcore.pki import certificates_from_pem, certificates_to_pem, key_to_pem
from fedcore.private_files import write_file
from fedcore.protocol import PROTOCOL, SESSION_KEY
from fedcore.raw_chunks import RawChunk
from fedcore.seeding import derive_seed
from fedcore.tensor_file import TensorManifest
from fedcore.tensor_stream import CHUNK_BYTES, manifest_from_proto, manifest_to_proto
from fedcore.v1 import federation_pb2

# isort: split
import grpc

T = TypeVar("T")
# Handshakes that one process has under way at once.
_AT_ONCE = 8
_PASSING = (
    grpc.StatusCode.CANCELLED,  # by a server that had no time for the call
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
_STORED = (
    federation_pb2.DeliverReply.OUTCOME_STORED,
    federation_pb2.DeliverReply.OUTCOME_ALREADY_STORED,
)
_IMAGES, _RIGHT = 100, 90
CAPABILITIES = federation_pb2.Capabilities(
    software_version="light agent", models=["noop", "cnn"], objectives=["cross_entropy", "impressions"],
    device="cpu", threads=1, num_examples=_IMAGES,
)  # fmt: skip


@dataclass(slots=True)
class Tally:
    """What became of the agents of a process. `lost` says why, an agent or a task each."""

    lost: list[str] = field(default_factory=list)
    delivered: int = 0
    evaluated: int = 0
    pongs: int = 0
    # Calls that were refused or too slow, and made again.
    asked_again: int = 0


class Models:
    """The models that the agents of this process have fetched, each kept once: what counts is that each fetched it."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[TensorManifest, bytes]] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._kept

    def keep(self, digest: str, manifest: TensorManifest, payload: bytes) -> None:
        """Keep this one, and the one before for who is late."""
        self._kept[digest] = manifest, payload
        while len(self._kept) > 2:
            del self._kept[next(iter(self._kept))]

    def get(self, digest: str) -> tuple[TensorManifest, bytes]:
        """A model that is kept."""
        return self._kept[digest]


class LightAgent:
    """One site's agent."""

    def __init__(self, credential: Credential, tally: Tally, models: Models) -> None:
        self._site = credential.subject.id
        self._credential = credential
        self._tally = tally
        self._sending = asyncio.Lock()
        self._models = models
        self._fetched = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending = False

    async def connect(self) -> None:
        """Hello, and the directive stream; what comes down is answered from then on."""
        self._channel = open_channel(self._credential)
        await self._channel.channel_ready()
        self._stub = federation_stub(self._channel)
        hello = federation_pb2.HelloRequest(protocol=PROTOCOL, capabilities=CAPABILITIES)
        reply = await self._insist(lambda: self._stub.Hello(hello))
        self._call = self._stub.Directives(metadata=((SESSION_KEY, reply.session),))
        await self._send(federation_pb2.AgentMessage(heartbeat=federation_pb2.Heartbeat()))
        self._begin(self._listen())
        self._begin(self._beat(reply.heartbeat_interval_s))

    async def _insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Ask again, as agents do, while the coordinator is busy with the others."""
        while True:
            try:
                return await call()
            except grpc.aio.AioRpcError as error:
                if error.code() not in _PASSING:
                    raise
                self._tally.asked_again += 1
                await asyncio.sleep(1.0)

    async def end(self) -> None:
        """Close the connection."""
        self._ending = True
        await self._channel.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(self._told(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _told(self, work: Coroutine[Any, Any, None]) -> None:
        """Count work that ends in an error before this agent is ended."""
        try:
            await work
        except Exception as error:
            if not self._ending:
                words = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
                self._tally.lost.append(f"{self._site}: {type(error).__name__}: {words}")

    async def _send(self, message: federation_pb2.AgentMessage) -> None:
        async with self._sending:
            await self._call.write(message)

    async def _beat(self, every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            await self._send(federation_pb2.AgentMessage(heartbeat=federation_pb2.Heartbeat()))

    async def _listen(self) -> None:
        async for directive in self._call:
            match directive.WhichOneof("directive"):
                case "train":
                    self._begin(self._train(directive.train))
                case "evaluate":
                    await self._evaluate(directive.evaluate)
                case "ping":
                    pong = federation_pb2.Pong(nonce=directive.ping.nonce)
                    await self._send(federation_pb2.AgentMessage(pong=pong))
                    self._tally.pongs += 1
                case _:
                    pass
        raise ConnectionError("the coordinator ended the directive stream")

    async def _evaluate(self, task: federation_pb2.EvaluateTask) -> None:
        """Answer at once, with made-up figures: the answer is what is measured."""
        split = federation_pb2.SplitMetrics(
            split="validation", num_examples=_IMAGES, num_correct=_RIGHT, loss_sum=1.0
        )
        report = federation_pb2.EvaluationReport(run=task.run, round=task.round, splits=[split])
        await self._send(federation_pb2.AgentMessage(evaluation=report))
        self._tally.evaluated += 1

    async def _train(self, task: federation_pb2.TrainTask) -> None:
        started = federation_pb2.TaskStarted(run=task.run, round=task.round)
        await self._send(federation_pb2.AgentMessage(started=started))
        if self._fetched != task.model.digest:
            await self._insist(lambda: self._fetch(task.model.digest))
        manifest, payload = self._models.get(task.model.digest)
        digest, first = made_update(manifest, payload, task.round, self._site)
        key = federation_pb2.DeliveryKey(run=task.run, round=task.round, site=self._site, digest=digest)
        await self._insist(lambda: self._stub.DeliveryOffset(federation_pb2.DeliveryOffsetRequest(key=key)))
        header = federation_pb2.DeliveryHeader(
            key=key, manifest=manifest_to_proto(manifest, digest),
            report=federation_pb2.UpdateReport(num_examples=_IMAGES, num_steps=1, seconds=0.0),
        )  # fmt: skip
        reply = await self._insist(lambda: self._stub.Deliver(_parts(header, first, payload)))
        if reply.outcome not in _STORED:
            outcome = federation_pb2.DeliverReply.Outcome.Name(reply.outcome)
            raise RuntimeError(f"round {task.round}: delivery answered {outcome}")
        self._tally.delivered += 1

    async def _fetch(self, digest: str) -> None:
        chunks: list[bytes] = []
        hashed = hashlib.sha256()
        keeps = digest not in self._models
        async for part in self._stub.Fetch(federation_pb2.FetchRequest(digest=digest)):
            if part.WhichOneof("part") == "manifest":
                manifest = manifest_from_proto(part.manifest)
                hashed.update(manifest.header())
                continue
            hashed.update(part.chunk.data)
            if keeps:
                chunks.append(part.chunk.data)
        if hashed.hexdigest() != digest:
            raise RuntimeError(f"what came is not the artifact {digest}")
        if keeps:
            self._models.keep(digest, manifest, b"".join(chunks))
        self._fetched = digest


def made_update(manifest: TensorManifest, payload: bytes, round_number: int, site: str) -> tuple[str, bytes]:
    """The model with another first float32 number, as `fedagent.noop` makes it: its digest, and its first chunk. The rest
    is the model's.
    """
    at = next(manifest.offsets()[spec.name][0] for spec in manifest.tensors if spec.dtype == "F32")
    first = bytearray(payload[:CHUNK_BYTES])
    (value,) = struct.unpack_from("<f", first, at)
    step = 0.5 + derive_seed(0, "noop", round_number, site) / 2**64
    struct.pack_into("<f", first, at, value + step if abs(value) < 1000 else step)
    digest = hashlib.sha256(manifest.header() + first)
    digest.update(memoryview(payload)[CHUNK_BYTES:])
    return digest.hexdigest(), bytes(first)


async def _parts(header: federation_pb2.DeliveryHeader, first: bytes, payload: bytes) -> AsyncIterator[Any]:
    yield federation_pb2.DeliverPart(header=header)
    yield RawChunk(0, first)
    for start in range(CHUNK_BYTES, len(payload), CHUNK_BYTES):
        yield RawChunk(start, payload[start : start + CHUNK_BYTES])


class EchoClient:
    """A stream to the bare echo server that sends back what comes; as little Python as can be."""

    def __init__(self, credential: Credential, address: str) -> None:
        self._channel = open_channel(replace(credential, coordinator=address))

    async def connect(self) -> None:
        """Open the stream; what comes down is sent back from then on."""
        await self._channel.channel_ready()
        self._call = self._channel.stream_stream(METHOD)()
        await self._call.write(b"here")
        self._task = asyncio.create_task(self._echo())

    async def end(self) -> None:
        """Close the connection."""
        self._task.cancel()
        await self._channel.close()

    async def _echo(self) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for message in self._call:
                await self._call.write(message)


Member = tuple[ec.EllipticCurvePrivateKey, Sequence[x509.Certificate]]


def write_members(path: Path, coordinator: str, ca_pem: str, members: Sequence[Member]) -> None:
    """Write the credentials of many sites into one private file."""
    pairs = [[key_to_pem(key).decode(), certificates_to_pem(list(chain)).decode()] for key, chain in members]
    write_file(path, json.dumps({"coordinator": coordinator, "ca": ca_pem, "members": pairs}).encode())


def read_members(path: Path, first: int, count: int) -> list[Credential]:
    """The credentials that `write_members` wrote, `count` of them."""
    document = json.loads(path.read_text())
    found = []
    for key_pem, chain_pem in document["members"][first : first + count]:
        leaf = certificates_from_pem(chain_pem.encode(), "member")[0]
        found.append(
            Credential(
                path, document["coordinator"], subject_of(leaf), leaf, document["ca"].encode(), chain_pem.encode(),
                key_pem.encode(),
            )
        )  # fmt: skip
    return found


async def serve(credentials: list[Credential], echo_address: str) -> None:
    """Do what each line of stdin says, until it ends."""
    tally, models = Tally(), Models()
    agents = [LightAgent(credential, tally, models) for credential in credentials]
    echoes = [EchoClient(credential, echo_address) for credential in credentials]
    connected: list[LightAgent | EchoClient] = []
    turns = asyncio.Semaphore(_AT_ONCE)

    async def connect(one: LightAgent | EchoClient) -> None:
        async with turns:
            await one.connect()
            connected.append(one)

    loop = asyncio.get_running_loop()
    while command := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
        answer: dict[str, Any] = {"at": datetime.now(UTC).isoformat()}
        if command in ("connect", "echo"):
            await asyncio.gather(*map(connect, agents if command == "connect" else echoes))
            answer["connected"] = len(connected)
        else:
            await asyncio.gather(*(one.end() for one in connected))
            answer |= {
                "lost": tally.lost,
                "delivered": tally.delivered,
                "pongs": tally.pongs,
                "asked_again": tally.asked_again,
            }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    members_file, first, count, echo_address = (
        Path(sys.argv[1]),
        int(sys.argv[2]),
        int(sys.argv[3]),
        sys.argv[4],
    )
    asyncio.run(serve(read_members(members_file, first, count), echo_address))
