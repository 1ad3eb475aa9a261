"""Fetch and deliver over a real gRPC connection to a service with scripted faults: cut, resume, refuse, damage."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fedagent import transfer
from fedagent.audit import Purpose, SiteAudit, open_site_audit
from fedagent.federation_stub import federation_stub
from fedagent.transfer import Transfers, load_record, save_record
from fedcore.artifact_store import ArtifactStore
from fedcore.audit import verify
from fedcore.errors import (
    DigestMismatchError,
    FedimpresError,
    NonFiniteError,
    NotFoundError,
    StorageError,
    TransferError,
    UnreachableError,
)
from fedcore.status import to_status
from fedcore.tensor_file import TensorSpec, read_manifest, write_tensor_file
from fedcore.tensor_stream import manifest_to_proto
from fedcore.v1 import federation_pb2, federation_pb2_grpc, tensor_pb2

# isort: split
import grpc

SIZE = 8 * 1000
CHUNK = 800


class Scripted(federation_pb2_grpc.FederationServicer):
    """Serves one artifact and takes one; `cuts` are payload bytes after which a stream breaks, in turn."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cuts: list[int] = []
        self.error: FedimpresError | None = None
        self.flip: int | None = None
        self.digest = ""
        self.received = b""
        self.asked: list[int] = []
        self.stored = False

    async def _fail(self, context: Any, error: FedimpresError) -> None:
        status, message, metadata = to_status(error)
        await context.abort(status, message, metadata)

    async def Fetch(self, request, context):
        if self.error is not None:
            await self._fail(context, self.error)
        self.asked.append(request.offset)
        manifest, start = read_manifest(self.path)
        yield tensor_pb2.ArtifactPart(manifest=manifest_to_proto(manifest, self.digest or request.digest))
        payload = bytearray(self.path.read_bytes()[start:])
        if self.flip is not None:
            payload[self.flip] ^= 1
        cut = self.cuts.pop(0) if self.cuts else None
        for offset in range(request.offset, len(payload), CHUNK):
            if cut is not None and offset >= cut:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            data = bytes(payload[offset : offset + CHUNK])
            yield tensor_pb2.ArtifactPart(chunk=tensor_pb2.Chunk(offset=offset, data=data))

    async def DeliveryOffset(self, request, context):
        return federation_pb2.DeliveryOffsetReply(offset=len(self.received), stored=self.stored)

    async def Deliver(self, request_iterator, context):
        if self.error is not None:
            await self._fail(context, self.error)
        cut = self.cuts.pop(0) if self.cuts else None
        async for part in request_iterator:
            if part.WhichOneof("part") == "header":
                self.asked.append(part.header.offset)
                continue
            assert part.chunk.offset == len(self.received)
            self.received += part.chunk.data
            if cut is not None:
                self.received = self.received[:cut]
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
        return federation_pb2.DeliverReply(outcome=federation_pb2.DeliverReply.OUTCOME_STORED)


MODEL = Purpose("model", "r", 1)


class Case:
    def __init__(self, root: Path) -> None:
        self.store = ArtifactStore(root / "site")
        self.audit_file = open_site_audit(root / "audit.db")
        source = root / "source.safetensors"
        self.digest = write_tensor_file(
            source, {"w": (TensorSpec("w", "I64", (SIZE // 8,)), bytes(range(250)) * 32)}
        )
        self.service = Scripted(source)
        self.ref = tensor_pb2.ArtifactRef(digest=self.digest, payload_bytes=SIZE)
        self.key = federation_pb2.DeliveryKey(run="r", round=1, site="a", digest=self.digest)
        self.moved: list[tuple[int, int]] = []
        self.stub: Any = None

    def transfers(self) -> Transfers:
        def stub() -> Any:
            if self.stub is None:
                raise UnreachableError("not connected to the coordinator")
            return self.stub

        return Transfers("a", self.store, stub, audit=SiteAudit(self.audit_file))

    def note(self, done: int, total: int) -> None:
        self.moved.append((done, total))


@asynccontextmanager
async def connected(case: Case) -> AsyncIterator[Transfers]:
    server = grpc.aio.server()
    federation_pb2_grpc.add_FederationServicer_to_server(case.service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]
        ) as channel:
            case.stub = federation_stub(channel)
            yield case.transfers()
    finally:
        await server.stop(0)


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    monkeypatch.setattr(transfer, "_BACKOFF_S", (0.01, 0.02))
    made = Case(tmp_path)
    yield made
    made.audit_file.close()


def go(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 20))


def partials(case: Case) -> list[Path]:
    return list((case.store.root / "partial").iterdir())


def test_a_fetch_that_is_cut_goes_on_where_it_was(case: Case) -> None:
    async def story() -> None:
        case.service.cuts = [2 * CHUNK, 5 * CHUNK, 5 * CHUNK]
        async with connected(case) as transfers:
            path = await transfers.fetch(case.ref, case.note, MODEL)
        assert path.read_bytes() == case.service.path.read_bytes()
        assert case.service.asked == [0, 2 * CHUNK, 5 * CHUNK, 5 * CHUNK]
        assert [done for done, _ in case.moved] == [CHUNK * n for n in range(1, 11)]
        assert {total for _, total in case.moved} == {SIZE}
        assert partials(case) == []

    go(story())


def test_what_is_here_is_not_fetched_again_unless_it_is_damaged(case: Case) -> None:
    async def story() -> None:
        async with connected(case) as transfers:
            path = await transfers.fetch(case.ref, case.note, MODEL)
            await transfers.fetch(case.ref, case.note, MODEL)
            assert case.service.asked == [0]
            restarted = case.transfers()
            await restarted.fetch(case.ref, case.note, MODEL)
            assert case.service.asked == [0]
            path.write_bytes(path.read_bytes()[:-1] + b"x")
            await case.transfers().fetch(case.ref, case.note, MODEL)
            assert case.service.asked == [0, 0]
            assert case.store.intact(case.digest)

    go(story())


def test_a_partial_file_that_does_not_fit_is_begun_again(case: Case) -> None:
    async def story() -> None:
        async with connected(case) as transfers:
            part = case.store.root / "partial" / f"{case.digest}.part"
            for left in (b"", b"short", b"\x08" + bytes(999)):
                part.write_bytes(left)
                path = await transfers.fetch(case.ref, case.note, MODEL)
                assert path.read_bytes() == case.service.path.read_bytes()
                case.store.delete(case.digest)

    go(story())


def test_wrong_bytes_are_refused_and_not_kept(case: Case) -> None:
    async def story() -> None:
        async with connected(case) as transfers:
            case.service.flip = 100
            with pytest.raises(DigestMismatchError, match="a fetch: digest of the bytes"):
                await transfers.fetch(case.ref, case.note, MODEL)
            case.service.flip, case.service.digest = None, "0" * 64
            with pytest.raises(TransferError, match="expected"):
                await transfers.fetch(case.ref, case.note, MODEL)
            case.service.digest, case.service.error = "", NotFoundError("gone")
            with pytest.raises(NotFoundError, match="gone"):
                await transfers.fetch(case.ref, case.note, MODEL)
        assert partials(case) == []
        assert list(case.store.digests()) == []

    go(story())


def test_a_delivery_that_is_cut_goes_on_where_the_coordinator_says(case: Case) -> None:
    async def story() -> None:
        case.service.cuts = [CHUNK, 0, 4 * CHUNK]
        async with connected(case) as transfers:
            outcome = await transfers.deliver(case.key, case.service.path, {"num_examples": 3}, case.note)
        assert outcome == federation_pb2.DeliverReply.OUTCOME_STORED
        assert case.service.asked == [0, CHUNK, 0, 4 * CHUNK]
        assert case.service.received == case.service.path.read_bytes()[-SIZE:]

    go(story())


def test_a_delivery_that_is_there_is_not_sent_and_a_refused_one_not_repeated(case: Case) -> None:
    async def story() -> None:
        async with connected(case) as transfers:
            case.service.error = NonFiniteError("a round 1: tensor 'w' holds NaN or Inf")
            with pytest.raises(NonFiniteError, match="tensor 'w'"):
                await transfers.deliver(case.key, case.service.path, {}, case.note)
            case.service.stored = True
            outcome = await transfers.deliver(case.key, case.service.path, {}, case.note)
            assert outcome == federation_pb2.DeliverReply.OUTCOME_ALREADY_STORED
        assert case.service.received == b""

    go(story())


def test_without_a_connection_a_transfer_waits_until_there_is_one(case: Case) -> None:
    async def story() -> None:
        waiting = asyncio.create_task(case.transfers().fetch(case.ref, case.note, MODEL))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        async with connected(case):
            path = await waiting
        assert path.is_file()

    go(story())


def test_the_coordinators_full_disk_passes_ones_own_damaged_file_does_not(case: Case) -> None:
    async def story() -> None:
        async with connected(case) as transfers:
            case.service.error = StorageError("disk full")
            delivering = asyncio.create_task(transfers.deliver(case.key, case.service.path, {}, case.note))
            await asyncio.sleep(0.1)
            assert not delivering.done(), "the update is kept and offered again"
            case.service.error = None
            assert await delivering == federation_pb2.DeliverReply.OUTCOME_STORED
            damaged = case.store.root / "damaged"
            damaged.write_bytes(b"not an update")
            with pytest.raises(StorageError, match="not a safetensors file"):
                await transfers.deliver(case.key, damaged, {}, case.note)
        assert case.service.received == case.service.path.read_bytes()[-SIZE:]

    go(story())


def test_what_no_task_needs_is_forgotten(case: Case) -> None:
    async def story() -> None:
        async with connected(case) as transfers:
            await transfers.fetch(case.ref, case.note, MODEL)
            stale = case.store.root / "partial" / ("1" * 64 + ".part")
            stale.write_bytes(b"x")
            transfers.forget_all_but({case.digest})
            assert case.digest in case.store
            assert not stale.exists()
            transfers.forget_all_but(set())
            assert case.digest not in case.store

    go(story())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"digest"', '{"digest": "d"}'])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r~1.json"
    assert load_record(path) is None
    path.write_text(text)
    assert load_record(path) is None
    save_record(path, {"digest": "d", "report": {}})
    assert load_record(path) == {"digest": "d", "report": {}}
    assert list(tmp_path.iterdir()) == [path]


def records(case: Case) -> list[dict[str, Any]]:
    log = SiteAudit(case.audit_file).log
    assert verify(log.walk()).finding is None
    return [entry.document for entry in log.walk()]


def test_every_byte_that_leaves_and_arrives_is_in_the_site_s_log(case: Case) -> None:
    async def story() -> None:
        case.service.cuts = [5 * CHUNK]
        async with connected(case) as transfers:
            path = await transfers.fetch(case.ref, case.note, MODEL)
            await transfers.fetch(case.ref, case.note, MODEL)  # is there: nothing arrives
            case.service.cuts = [2 * CHUNK]
            await transfers.deliver(case.key, path, {"num_examples": 3}, case.note)

    go(story())
    received, *deliveries = records(case)
    assert (received["action"], received["object"]) == ("artifact.receive", f"artifact/{case.digest}")
    assert received["detail"] == {"purpose": "model", "run": "r", "round": 1, "bytes": SIZE}
    said = [(one["action"], one["result"], one["detail"].get("offset")) for one in deliveries]
    assert said == [
        ("artifact.send", "ok", 0),
        ("artifact.sent", "cut", None),
        ("artifact.send", "ok", 2 * CHUNK),
        ("artifact.sent", "ok", None),
    ]
    assert all(one["object"] == f"artifact/{case.digest}" for one in deliveries)
    assert all(one["detail"]["purpose"] == "update" for one in deliveries)
    # What was handed over, and thrown away by the cut, counts as well.
    assert deliveries[1]["detail"]["bytes"] >= 2 * CHUNK
    assert deliveries[3]["detail"]["bytes"] == SIZE - 2 * CHUNK


def test_nothing_leaves_that_can_not_be_recorded(case: Case) -> None:
    async def story() -> None:
        async with connected(case) as transfers:
            path = await transfers.fetch(case.ref, case.note, MODEL)
            case.audit_file.close()
            with pytest.raises(StorageError):
                await transfers.deliver(case.key, path, {"num_examples": 3}, case.note)

    go(story())
    assert case.service.received == b""
