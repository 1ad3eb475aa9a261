"""A model on its way in from an operator."""

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from fedcore.artifact_store import ArtifactStore
from fedcore.tensor_stream import TensorSink, manifest_from_proto
from fedcore.v1 import tensor_pb2
from fedserver.threads import in_pool


async def receive_model(
    message: tensor_pb2.Manifest,
    chunks: AsyncIterator[tuple[int, bytes]],
    store: ArtifactStore,
    pool: ThreadPoolExecutor,
    who: str,
) -> str:
    """Store an uploaded artifact; returns its digest. Raises TransferError and its kinds; nothing is kept then."""
    manifest = manifest_from_proto(message)
    sink = TensorSink(store.new_path(), manifest, message.digest, who=who, require_finite=True)
    try:
        async for offset, data in chunks:
            await in_pool(pool, sink.write, offset, data)
        await in_pool(pool, sink.finish)
    except BaseException:
        sink.discard()
        raise
    sink.close()
    await in_pool(pool, store.adopt, sink.path, message.digest)
    return message.digest
