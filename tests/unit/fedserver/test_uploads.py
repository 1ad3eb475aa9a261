"""A model that an operator uploads: stored whole or not at all, and no file closed under the thread that writes."""

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedcore.artifact_store import ArtifactStore
from fedcore.errors import DigestMismatchError
from fedcore.tensor_file import TensorManifest, TensorSpec
from fedcore.tensor_stream import TensorSink, manifest_to_proto
from fedserver.threads import in_pool
from fedserver.uploads import receive_model

MANIFEST = TensorManifest.of([TensorSpec("w", "F32", (256,))])
PAYLOAD = bytes(MANIFEST.payload_bytes)
DIGEST = hashlib.sha256(MANIFEST.header() + PAYLOAD).hexdigest()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as made:
        yield made


async def chunks(payload: bytes = PAYLOAD) -> AsyncIterator[tuple[int, bytes]]:
    for at in range(0, len(payload), 512):
        yield at, payload[at : at + 512]


def receive(store: ArtifactStore, pool: ThreadPoolExecutor, parts: AsyncIterator[tuple[int, bytes]]):  # type: ignore[no-untyped-def]
    return receive_model(manifest_to_proto(MANIFEST, DIGEST), parts, store, pool, "operator o")


def files(store: ArtifactStore) -> list[Path]:
    return [path for path in store.root.rglob("*") if path.is_file()]


def test_a_good_upload_is_stored_and_a_bad_one_leaves_nothing(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    with pytest.raises(DigestMismatchError, match="operator o"):
        asyncio.run(receive(store, pool, chunks(b"\1" * len(PAYLOAD))))
    assert files(store) == []
    assert asyncio.run(receive(store, pool, chunks())) == DIGEST
    assert files(store) == [store.path(DIGEST)]
    assert store.intact(DIGEST)


def test_cancelled_while_a_thread_writes_the_file_is_closed_after_it(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    entered, go_on = threading.Event(), threading.Event()
    told: list[str] = []
    write, discard = TensorSink.write, TensorSink.discard

    def slow_write(sink: TensorSink, offset: int, data: bytes) -> None:
        entered.set()
        go_on.wait(10)
        write(sink, offset, data)
        told.append("written")

    def told_discard(sink: TensorSink) -> None:
        told.append("discarded")
        discard(sink)

    monkeypatch.setattr(TensorSink, "write", slow_write)
    monkeypatch.setattr(TensorSink, "discard", told_discard)

    async def scenario() -> None:
        task = asyncio.create_task(receive(store, pool, chunks()))
        await asyncio.to_thread(entered.wait, 10)
        for _ in range(3):  # the call is cancelled, then the server stops
            task.cancel()
            await asyncio.sleep(0.02)
        assert (told, task.done()) == ([], False)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert told == ["written", "discarded"]
    assert files(store) == []


def test_in_pool_gives_results_and_errors_and_swallows_those_of_the_cancelled(
    pool: ThreadPoolExecutor,
) -> None:
    gate = threading.Event()

    def fail() -> None:
        gate.wait(10)
        raise OSError("disk")

    async def scenario() -> None:
        assert await in_pool(pool, divmod, 7, 2) == (3, 1)
        task = asyncio.create_task(in_pool(pool, fail))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.sleep(0)
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(OSError, match="disk"):
            await in_pool(pool, fail)

    asyncio.run(scenario())
