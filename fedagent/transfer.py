"""Artifacts to and from the coordinator. Both directions resume after a cut and try again until withdrawn."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import structlog

from fedagent.audit import Purpose, SiteAudit
from fedagent.throttle import Throttle
from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.artifact_store import ArtifactStore
from fedcore.audit import OK
from fedcore.errors import (
    CallTimeoutError,
    ConflictError,
    DigestMismatchError,
    FedimpresError,
    OverloadedError,
    StorageError,
    TensorMismatchError,
    TransferError,
    TruncatedStreamError,
    UnreachableError,
)
from fedcore.raw_chunks import RawChunk
from fedcore.status import from_rpc_error
from fedcore.tensor_file import read_manifest
from fedcore.tensor_stream import TensorSink, manifest_from_proto, manifest_to_proto, read_payload
from fedcore.v1 import federation_pb2, federation_pb2_grpc, tensor_pb2

# isort: split
import grpc

# What passes by itself: the coordinator is away or busy, a stream was cut, a newer stream took over.
PASSING = (UnreachableError, CallTimeoutError, OverloadedError, TruncatedStreamError, ConflictError)
_BACKOFF_S = (0.2, 10.0)

Moved = Callable[[int, int], None]
T = TypeVar("T")
log = structlog.get_logger(__name__)


class Transfers:
    """Fetches into and delivers from the agent's artifact store, no faster than `throttle` allows.

    `stub` gives the present connection.
    """

    def __init__(
        self,
        site: str,
        store: ArtifactStore,
        stub: "Callable[[], federation_pb2_grpc.FederationAsyncStub]",
        throttle: Throttle | None = None,
        *,
        audit: SiteAudit,
    ) -> None:
        self._site = site
        self._store = store
        self._stub = stub
        self._throttle = throttle or Throttle(None)
        self._audit = audit
        self._verified: set[str] = set()
        # Payload moved since the start, what was moved again included.
        self.fetched_bytes = self.delivered_bytes = 0
        self._partial = store.root / "partial"
        self._partial.mkdir(exist_ok=True)

    async def fetch(self, ref: tensor_pb2.ArtifactRef, moved: Moved, purpose: Purpose) -> Path:
        """Have an artifact here, fetching what is missing of it. `moved(done, total)` reports bytes.

        Raises TransferError for an artifact that is not what its reference says, NotFoundError if it is gone.
        """
        if ref.digest in self._store:
            if ref.digest in self._verified or await asyncio.to_thread(self._store.intact, ref.digest):
                self._verified.add(ref.digest)
                return self._store.path(ref.digest)
            log.warning("cached artifact is damaged, fetching it again", digest=ref.digest)
            self._store.delete(ref.digest)
        path = await self._insist(lambda: self._fetch_once(ref, moved), "fetch")
        await self._audit.arrived(ref.digest, ref.payload_bytes, purpose)
        return path

    async def deliver(
        self, key: federation_pb2.DeliveryKey, path: Path, report: dict[str, Any], moved: Moved
    ) -> "federation_pb2.DeliverReply.Outcome.ValueType":
        """Deliver an update; returns when the coordinator has it for good, or does not want it any more.

        Raises FedimpresError if the coordinator refuses it.
        """
        return await self._insist(lambda: self._deliver_once(key, path, report, moved), "deliver")

    def forget_all_but(self, digests: set[str]) -> None:
        """Delete cached artifacts that no task needs any more."""
        for digest in list(self._store.digests()):
            if digest not in digests:
                self._store.delete(digest)
                self._verified.discard(digest)
        for path in self._partial.iterdir():
            if path.stem not in digests:
                path.unlink(missing_ok=True)

    def forget_partial(self) -> None:
        """Delete what has come of artifacts whose fetch was given up. Call while no fetch is in progress."""
        for path in self._partial.iterdir():
            path.unlink(missing_ok=True)

    async def _insist(self, attempt: Callable[[], Awaitable[T]], what: str) -> T:
        delay = _BACKOFF_S[0]
        while True:
            try:
                return await attempt()
            except grpc.RpcError as error:
                failure = from_rpc_error(error, "coordinator")
                passing = isinstance(
                    failure, (*PASSING, StorageError)
                )  # a full disk there, which is mended there
            except FedimpresError as error:
                failure = error
                passing = isinstance(failure, PASSING)
            if not passing:
                raise failure
            log.info(
                "transfer was cut, trying again",
                kind=what,
                site=self._site,
                code=failure.code,
                error=failure.message,
                in_s=round(delay, 1),
            )
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
            delay = min(2 * delay, _BACKOFF_S[1])

    async def _fetch_once(self, ref: tensor_pb2.ArtifactRef, moved: Moved) -> Path:
        part_path = self._partial / f"{ref.digest}.part"
        header = 8 if part_path.exists() else 0
        offset = max(0, part_path.stat().st_size - _header_bytes(part_path)) if header else 0
        offset -= offset % 8
        call = self._stub().Fetch(federation_pb2.FetchRequest(digest=ref.digest, offset=offset))
        sink: TensorSink | None = None
        try:
            async for part in call:
                if sink is None:
                    sink = await asyncio.to_thread(self._open_sink, part.manifest, ref, part_path)
                    if sink.offset != offset:
                        sink.discard()
                        raise TruncatedStreamError(f"{self._site}: partial file does not fit, starting again")
                    continue
                await asyncio.to_thread(sink.write, part.chunk.offset, part.chunk.data)
                self.fetched_bytes += len(part.chunk.data)
                moved(sink.offset, ref.payload_bytes)
                await self._throttle.passed(len(part.chunk.data))
            if sink is None:
                raise TruncatedStreamError(f"{self._site}: artifact stream ended before its manifest")
            await asyncio.to_thread(sink.finish)
        except (TensorMismatchError, DigestMismatchError):
            if sink is not None:
                sink.discard()
            raise
        finally:
            call.cancel()
            if sink is not None:
                sink.close()
        # Not fsynced: after a power cut the digest tells, and the file is fetched again.
        self._verified.add(ref.digest)
        return await asyncio.to_thread(self._store.adopt, part_path, ref.digest, durable=False)

    def _open_sink(self, message: tensor_pb2.Manifest, ref: tensor_pb2.ArtifactRef, path: Path) -> TensorSink:
        manifest = manifest_from_proto(message)
        if message.digest != ref.digest or manifest.payload_bytes != ref.payload_bytes:
            raise TransferError(f"{self._site}: got artifact {message.digest[:64]!r}, expected {ref.digest}")
        return TensorSink(path, manifest, ref.digest, who=f"{self._site} fetch", require_finite=False)

    async def _deliver_once(
        self, key: federation_pb2.DeliveryKey, path: Path, report: dict[str, Any], moved: Moved
    ) -> "federation_pb2.DeliverReply.Outcome.ValueType":
        manifest, start = await asyncio.to_thread(read_manifest, path)
        stub = self._stub()
        known = await stub.DeliveryOffset(federation_pb2.DeliveryOffsetRequest(key=key))
        if known.stored:
            return federation_pb2.DeliverReply.OUTCOME_ALREADY_STORED
        header = federation_pb2.DeliveryHeader(
            key=key,
            manifest=manifest_to_proto(manifest, key.digest),
            report=federation_pb2.UpdateReport(**report),
            offset=known.offset,
        )
        sent = 0

        async def parts() -> AsyncIterator[Any]:
            nonlocal sent
            yield federation_pb2.DeliverPart(header=header)
            offset = known.offset
            chunks = read_payload(path, start, offset)
            while (data := await asyncio.to_thread(next, chunks, None)) is not None:
                await self._throttle.passed(len(data))
                sent += len(data)
                self.delivered_bytes += len(data)
                yield RawChunk(offset, data)
                offset += len(data)
                moved(offset, manifest.payload_bytes)

        result, purpose = "cut", Purpose("update", key.run, key.round)
        await self._audit.sending(key.digest, manifest.payload_bytes, known.offset, purpose)
        try:
            reply = await stub.Deliver(parts())
            result = OK
        finally:
            await self._audit.sent(key.digest, sent, result, purpose)
        return reply.outcome


def _header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def load_record(path: Path) -> dict[str, Any] | None:
    """A finished task's record; None if there is none that can be read."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and {"digest", "report"} <= record.keys() else None


def save_record(path: Path, record: dict[str, Any]) -> None:
    """Write a finished task's record as a whole."""
    staged = path.with_suffix(".tmp")
    staged.write_text(json.dumps(record))
    staged.replace(path)
