"""Updates on their way in: resumable, fenced, verified, durable before they are answered.

A delivery spools into one file a (run, round, site, digest); what an interrupted stream left there is where the next one
goes on. A newer stream of the same delivery ends the older. Disk and hashing happen in a bounded pool of threads.
"""

import asyncio
import math
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from fedcore.artifact_store import ArtifactStore
from fedcore.errors import (
    ConflictError,
    DigestMismatchError,
    NonFiniteError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    TensorMismatchError,
    TransferError,
)
from fedcore.tensor_file import TensorManifest, check_expected
from fedcore.tensor_stream import TensorSink, check_digest_form, manifest_from_proto, resumable_bytes
from fedcore.v1 import federation_pb2
from fedserver import round_events as ev
from fedserver.directives import expected_update, report_from_proto
from fedserver.roster import Roster
from fedserver.round_driver import RoundDriver
from fedserver.round_state import RunState
from fedserver.threads import in_pool
from fedserver.turns import Turns

# Bytes after which a spooled update is sent on to the disk, so that the last fsync has little left to wait for.
_WRITE_BACK_BYTES = 8 << 20

T = TypeVar("T")
Outcome = federation_pb2.DeliverReply.Outcome


class Deliveries:
    """Takes updates in for the round under way."""

    def __init__(
        self,
        driver: RoundDriver,
        store: ArtifactStore,
        roster: Roster,
        spool: Path,
        pool: ThreadPoolExecutor,
        turns: Turns,
        max_site_bytes: int,
    ) -> None:
        self._driver = driver
        self._store = store
        self._roster = roster
        self._spool = spool
        self._pool = pool
        self._turns = turns
        self._max_site_bytes = max_site_bytes
        # How large each update that is arriving says it is, by site.
        self._incoming: dict[str, dict[Path, int]] = {}
        # Files in the spool, those that nobody sends just now included, by run, round and site.
        self._spooled: dict[str, set[Path]] = {}
        # Before which round the spool was swept.
        self._swept = ("", 0)
        # Of each delivery under way, what its newest stream's successor sets.
        self._streams: dict[Path, asyncio.Event] = {}
        self._locks: dict[Path, asyncio.Lock] = {}
        spool.mkdir(parents=True, exist_ok=True)
        for path in spool.glob("*.part"):
            self._spooled.setdefault(_delivery_of(path), set()).add(path)
        self._sweep()

    def offset(self, site: str, key: federation_pb2.DeliveryKey) -> federation_pb2.DeliveryOffsetReply:
        """How much of an update is here. Raises TransferError on a malformed key, NotFoundError on an unknown run."""
        if self._stored(site, key):
            return federation_pb2.DeliveryOffsetReply(stored=True)
        path = self._path(site, key)
        if not path.exists():
            return federation_pb2.DeliveryOffsetReply(offset=0)
        return federation_pb2.DeliveryOffsetReply(
            offset=resumable_bytes(path.stat().st_size, expected_update(self._state(key.run)))
        )

    async def receive(
        self,
        site: str,
        header: federation_pb2.DeliveryHeader,
        parts: AsyncIterator[federation_pb2.DeliverPart],
    ) -> Outcome.ValueType:
        """Take one update in. Returns once it is durable and journalled.

        Raises TensorMismatchError, NonFiniteError, DigestMismatchError (the spooled bytes are dropped),
        TruncatedStreamError (they are kept, to go on from), ProtocolError, NotFoundError, OverloadedError.
        """
        key = header.key
        if self._stored(site, key):
            return Outcome.OUTCOME_ALREADY_STORED
        state = self._state(key.run)
        if not state.awaits_update(site, key.round):
            return Outcome.OUTCOME_TOO_LATE
        who = f"{site} round {key.round}"
        manifest = manifest_from_proto(header.manifest)
        check_expected(manifest, expected_update(state), who)
        report = _checked_report(header.report, who)
        if header.manifest.digest != key.digest:
            raise TransferError(f"{who}: the manifest's digest differs from the delivery's")
        if (key.run, key.round) != self._swept:  # the first update of a round finds what others left
            self._sweep()
            self._swept = (key.run, key.round)
        path = self._path(site, key)
        self._check_room(site, path, manifest.payload_bytes)
        self._drop_other_spools(path)
        if (older := self._streams.get(path)) is not None:
            older.set()
        stream = self._streams[path] = asyncio.Event()
        self._incoming.setdefault(site, {})[path] = manifest.payload_bytes
        self._spooled.setdefault(_delivery_of(path), set()).add(path)
        try:
            async with self._locks.setdefault(path, asyncio.Lock()):
                await self._spool_parts(path, stream, manifest, header, who, parts, site)
                await in_pool(self._pool, self._store.adopt, path, key.digest)
        finally:
            if self._streams.get(path) is stream:
                del self._streams[path]
                self._arrived(site, path)
                self._locks.pop(path, None)
        event = ev.UpdateStored(
            at=self._driver.wall(), round=key.round, site=site, digest=key.digest,
            payload_bytes=manifest.payload_bytes, report=report,
        )  # fmt: skip
        try:
            await self._driver.post(key.run, event)
        except ConflictError:
            if self._stored(site, key):
                return Outcome.OUTCOME_ALREADY_STORED
            self._driver.discard_unneeded(key.digest)
            return Outcome.OUTCOME_TOO_LATE
        return Outcome.OUTCOME_STORED

    async def _spool_parts(
        self,
        path: Path,
        superseded: asyncio.Event,
        manifest: TensorManifest,
        header: federation_pb2.DeliveryHeader,
        who: str,
        parts: AsyncIterator[federation_pb2.DeliverPart],
        site: str,
    ) -> None:
        sink: TensorSink = await in_pool(
            self._pool, TensorSink, path, manifest, header.key.digest, who=who, require_finite=True
        )
        written_back = 0
        write_back: asyncio.Task[None] | None = None
        try:
            while True:
                async with self._turns.turn(manifest.payload_bytes - sink.offset) as keep_turn:
                    part = await _next_unless(superseded, parts)
                    keep_turn()
                    if part is None:
                        break
                    if superseded.is_set():
                        raise ConflictError(f"{who}: a newer stream delivers this update")
                    if part.WhichOneof("part") != "chunk":
                        raise ProtocolError(f"{who}: expected a chunk, got a second header")
                    await in_pool(self._pool, sink.write, part.chunk.offset, part.chunk.data)
                self._roster.progressed(site)
                if sink.offset - written_back >= _WRITE_BACK_BYTES and (
                    write_back is None or write_back.done()
                ):
                    if write_back is not None:
                        await write_back  # an error of the disk is told once only: here
                    written_back = sink.offset
                    write_back = asyncio.create_task(in_pool(self._pool, sink.sync))
            if write_back is not None:
                await write_back
            await in_pool(self._pool, sink.finish)
        except (NonFiniteError, DigestMismatchError, TensorMismatchError):
            await _ended(write_back)
            await in_pool(self._pool, sink.discard)
            raise
        finally:
            await _ended(write_back)
            sink.close()

    def _check_room(self, site: str, path: Path, payload_bytes: int) -> None:
        """Raise OverloadedError if a site would have more on its way in than one site may."""
        others = sum(size for other, size in self._incoming.get(site, {}).items() if other != path)
        if others + payload_bytes > self._max_site_bytes:
            raise OverloadedError(
                f"{site}: {payload_bytes} bytes more, with {others} on their way in already, are above the limit of "
                f"{self._max_site_bytes} for one site",
                hint="it tries again by itself; the limit is spool_mib of [limits] in fedserver.toml",
            )

    def _arrived(self, site: str, path: Path) -> None:
        """Note that nothing more of an update is on its way; what a cut left of it stays known."""
        arriving = self._incoming[site]
        del arriving[path]
        if not arriving:
            del self._incoming[site]
        if not path.exists():
            self._forget(path)

    def _drop_other_spools(self, path: Path) -> None:
        """One half-arrived update a site and round: a new digest takes the place of what was left of another."""
        for other in self._spooled.get(_delivery_of(path), set()) - {path}:
            if other not in self._streams:
                self._drop(other)

    def _sweep(self) -> None:
        """Delete what interrupted deliveries of rounds that are over left in the spool."""
        for path in [path for paths in self._spooled.values() for path in paths]:
            run, round_number, site = path.name.split("~")[:3]
            try:
                state = self._state(run)
            except NotFoundError:
                wanted = False
            else:
                wanted = round_number in map(str, state.open_rounds(site))
            if path not in self._streams and not wanted:
                self._drop(path)

    def _drop(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self._forget(path)

    def _forget(self, path: Path) -> None:
        name = _delivery_of(path)
        paths = self._spooled[name]
        paths.discard(path)
        if not paths:
            del self._spooled[name]

    def _state(self, run: str) -> RunState:
        """State of a run, named in full. Raises NotFoundError."""
        state = self._driver.view(run).state
        if state.run != run:
            raise NotFoundError(f"no run {run[:80]!r}")
        return state

    def _stored(self, site: str, key: federation_pb2.DeliveryKey) -> bool:
        update = self._state(key.run).stored_update(site, key.round)
        return update is not None and update.digest == key.digest

    def _path(self, site: str, key: federation_pb2.DeliveryKey) -> Path:
        return (
            self._spool
            / f"{self._state(key.run).run}~{key.round}~{site}~{check_digest_form(key.digest)[:16]}.part"
        )


def _delivery_of(path: Path) -> str:
    """Run, round and site of a spooled file (see `Deliveries._path`)."""
    return path.name.rpartition("~")[0]


async def _ended(write_back: asyncio.Task[None] | None) -> None:
    """Wait for a write-back whose outcome no longer matters: no file is closed under a thread that syncs it."""
    if write_back is not None:
        await asyncio.gather(write_back, return_exceptions=True)


async def _next_unless(
    superseded: asyncio.Event, parts: AsyncIterator[federation_pb2.DeliverPart]
) -> federation_pb2.DeliverPart | None:
    """The next part, None at the end; raises ConflictError as soon as a newer stream takes over.

    A connection that is half open would say nothing for a while, and keep the newer stream waiting.
    """
    part, newer = asyncio.ensure_future(anext(parts, None)), asyncio.ensure_future(superseded.wait())
    try:
        await asyncio.wait({part, newer}, return_when=asyncio.FIRST_COMPLETED)
        if part.done():
            return part.result()
        raise ConflictError("a newer stream delivers this update")
    finally:
        newer.cancel()
        part.cancel()


def _checked_report(report: federation_pb2.UpdateReport, who: str) -> ev.Report:
    if report.num_examples < 1:
        raise TransferError(
            f"{who}: says that it trained on {report.num_examples} images, expected at least 1"
        )
    if not math.isfinite(report.train_loss) or not math.isfinite(report.seconds):
        raise NonFiniteError(f"{who}: its report holds a loss or a time that is not a finite number")
    return report_from_proto(report, who)
