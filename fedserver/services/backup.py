"""The Backup service: the coordinator's state as one sealed file."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

import structlog
from pydantic import ValidationError

from fedcore import tls as _tls  # noqa: F401 - before grpc
from fedcore.artifact_store import ArtifactStore
from fedcore.backup.keys import Recipient, ScryptTerms, public_key
from fedcore.errors import ConfigError, ConflictError
from fedcore.plan import describe_problems
from fedcore.tensor_stream import CHUNK_BYTES
from fedcore.v1 import backup_pb2, backup_pb2_grpc
from fedserver.backup import Snapshot, snapshot
from fedserver.call_audit import note
from fedserver.config import ServerHome
from fedserver.threads import in_pool
from fedserver.turns import Turns

log = structlog.get_logger(__name__)


class BackupService(backup_pb2_grpc.BackupServicer):
    """Takes one backup at a time."""

    def __init__(
        self,
        places: ServerHome,
        federation: str,
        store: ArtifactStore,
        pool: ThreadPoolExecutor,
        turns: Turns,
    ) -> None:
        self._places = places
        self._federation = federation
        self._store = store
        self._pool = pool
        self._turns = turns
        self._taking = asyncio.Lock()

    async def CreateBackup(  # noqa: N802 - the name in the contract
        self, request: backup_pb2.CreateBackupRequest, context: Any
    ) -> AsyncIterator[backup_pb2.BackupPart]:
        """Stream a backup, sealed for the recipient. Raises ConfigError, ConflictError, StorageError, BackupError."""
        recipient = _recipient(request)
        if self._taking.locked():
            raise ConflictError("a backup is being taken already", hint="wait for its end")
        async with self._taking:
            held = ExitStack()
            opening = snapshot(self._places, self._federation, self._store, datetime.now(UTC))
            try:
                taken = await in_pool(self._pool, held.enter_context, opening)
                note(f"backup/{taken.id}", artifacts=taken.artifacts, absent=len(taken.absent))
                async for part in self._stream(taken, taken.sealed(recipient)):
                    yield part
            finally:
                await in_pool(self._pool, held.close)

    async def _stream(self, taken: Snapshot, pieces: Iterator[bytes]) -> AsyncIterator[backup_pb2.BackupPart]:
        digest, size = hashlib.sha256(), 0
        while True:
            async with self._turns.turn(CHUNK_BYTES):
                piece = await in_pool(self._pool, next, pieces, None)
                if piece is None:
                    break
                digest.update(piece)
                size += len(piece)
                yield backup_pb2.BackupPart(data=piece)
        log.info(
            "backup taken", id=taken.id, bytes=size, artifacts=taken.artifacts, absent=list(taken.absent)
        )
        yield backup_pb2.BackupPart(
            summary=backup_pb2.BackupSummary(
                id=taken.id,
                created_at=taken.created_at,
                term=taken.term.number,
                file_bytes=size,
                sha256=digest.hexdigest(),
                artifacts=taken.artifacts,
                absent=taken.absent,
            )
        )


def _recipient(request: backup_pb2.CreateBackupRequest) -> Recipient:
    public_key(request.recipient)
    if not request.HasField("scrypt"):
        return Recipient(request.recipient)
    given = request.scrypt
    try:
        terms = ScryptTerms(salt=given.salt.hex(), n=given.n, r=given.r, p=given.p)
    except ValidationError as error:
        raise ConfigError(f"the backup's passphrase: {describe_problems(error)}") from error
    return Recipient(request.recipient, terms)
