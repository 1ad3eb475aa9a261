"""Artifacts on their way out, in chunks read by a bounded pool of threads."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedcore.errors import TransferError
from fedcore.raw_chunks import RawChunk
from fedcore.tensor_file import read_manifest
from fedcore.tensor_stream import manifest_to_proto, read_payload
from fedcore.v1 import tensor_pb2
from fedserver.turns import Turns


async def stream_artifact(
    path: Path, digest: str, offset: int, pool: ThreadPoolExecutor, turns: Turns
) -> AsyncIterator[tensor_pb2.ArtifactPart | RawChunk]:
    """Yield the manifest, then the payload from `offset`. Raises TransferError if `offset` lies outside it."""
    manifest, start = read_manifest(path)
    if not 0 <= offset <= manifest.payload_bytes:
        raise TransferError(f"offset {offset} lies outside the artifact's {manifest.payload_bytes} bytes")
    yield tensor_pb2.ArtifactPart(manifest=manifest_to_proto(manifest, digest))
    loop = asyncio.get_running_loop()
    chunks = read_payload(path, start, offset)
    while offset < manifest.payload_bytes:
        async with turns.turn(manifest.payload_bytes - offset):
            data = await loop.run_in_executor(pool, next, chunks)
            yield RawChunk(offset, data)
        offset += len(data)
