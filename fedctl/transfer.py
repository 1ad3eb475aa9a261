"""Artifacts between the operator's disk and the coordinator: verified while they arrive, resumed after a
cut.
"""

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedcore.digest import file_digest
from fedcore.errors import (
    CallTimeoutError,
    DigestMismatchError,
    OverloadedError,
    StorageError,
    TruncatedStreamError,
    UnreachableError,
)

if TYPE_CHECKING:
    from fedcore.tensor_stream import TensorSink
    from fedcore.v1 import tensor_pb2
    from fedctl.admin import Admin

ATTEMPTS = 5
FIRST_PAUSE_S = 0.5
_READ_BYTES = 4 << 20

# Called with payload bytes there and payload bytes in all.
OnBytes = Callable[[int, int], None]
# Opens a stream of an artifact from a payload byte on.
StreamFrom = Callable[[int], Generator["tensor_pb2.ArtifactPart", None, None]]


def download_artifact(
    admin: "Admin",
    digest: str,
    out: Path,
    *,
    on_bytes: OnBytes = lambda done, total: None,
    sleep: Callable[[float], None] = time.sleep,
    stream_from: "StreamFrom | None" = None,
) -> None:
    """Fetch an artifact into the file `out`, which appears whole and verified or not at all.

    `stream_from(offset)` opens its stream, Admin.Download's if it is not given. What has arrived lies in
    `OUT.part` meanwhile; a cut stream is resumed from there, up to ATTEMPTS times without a byte gained, and
    so is the next call. Raises DigestMismatchError or TensorMismatchError (nothing is kept then),
    StorageError, and what the coordinator answers.
    """
    part = out.with_name(out.name + ".part")
    download = _Download(admin, digest, part, on_bytes, stream_from or _downloads(admin, digest))
    failures = 0
    try:
        while not download.complete:
            before = download.offset
            try:
                download.receive()
            except (UnreachableError, CallTimeoutError, OverloadedError, TruncatedStreamError):
                failures = 1 if download.offset > before else failures + 1
                if failures >= ATTEMPTS:
                    raise
                sleep(FIRST_PAUSE_S * 2 ** (failures - 1) * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        download.store(out)
    except OSError as error:
        raise StorageError(f"{out}: can't be written: {error}") from error
    finally:
        download.close()


def _downloads(admin: "Admin", digest: str) -> "StreamFrom":
    def stream_from(offset: int) -> Generator["tensor_pb2.ArtifactPart", None, None]:
        from fedcore.v1 import admin_pb2

        request = admin_pb2.DownloadRequest(digest=digest, offset=offset)
        return admin.stream(lambda stub: stub.Download, request)

    return stream_from


def upload_model(admin: "Admin", path: Path, *, on_bytes: OnBytes = lambda done, total: None) -> str:
    """Send a safetensors file of any writer to the coordinator and return the digest of its canonical form.

    Raises StorageError if it is no safetensors file, TensorMismatchError for tensors that an artifact can't
    hold, DigestMismatchError if the coordinator stored other bytes.
    """
    from fedctl.initial_model import canonical_model

    with tempfile.TemporaryDirectory(prefix="fedctl-") as scratch:
        return _upload(admin, canonical_model(path, Path(scratch) / path.name), on_bytes)


def _upload(admin: "Admin", path: Path, on_bytes: OnBytes) -> str:
    from fedcore.tensor_file import read_manifest

    manifest, start = read_manifest(path)
    digest = file_digest(path)

    def parts() -> Iterator["tensor_pb2.ArtifactPart"]:
        from fedcore.tensor_stream import manifest_to_proto, read_payload
        from fedcore.v1 import tensor_pb2

        yield tensor_pb2.ArtifactPart(manifest=manifest_to_proto(manifest, digest))
        offset = 0
        for data in read_payload(path, start, 0):
            yield tensor_pb2.ArtifactPart(chunk=tensor_pb2.Chunk(offset=offset, data=data))
            offset += len(data)
            on_bytes(offset, manifest.payload_bytes)

    reply = admin.upload(lambda stub: stub.UploadModel, parts())
    if reply.digest != digest:
        raise DigestMismatchError(f"{path}: {admin.who} stored {reply.digest}, expected {digest}")
    return digest


class _Download:
    """One artifact on its way into the file `part`, over as many streams as it takes."""

    def __init__(
        self, admin: "Admin", digest: str, part: Path, on_bytes: OnBytes, stream_from: "StreamFrom"
    ) -> None:
        self._stream_from = stream_from
        self._admin = admin
        self._digest = digest
        self._part = part
        self._on_bytes = on_bytes
        self._sink: TensorSink | None = None
        self._total = 0

    @property
    def offset(self) -> int:
        """Payload bytes that are there."""
        return self._sink.offset if self._sink else 0

    @property
    def complete(self) -> bool:
        """Whether all payload is there."""
        return self._sink is not None and self._sink.complete

    def receive(self) -> None:
        """Take in one stream from where the last one ended. Raises TruncatedStreamError if it ends early."""
        asked = self.offset
        with contextlib.closing(self._stream_from(asked)) as stream:
            for message in stream:
                if message.WhichOneof("part") == "manifest":
                    self._open(message.manifest)
                    if self.offset != asked:
                        return  # An earlier call left a beginning of it: ask again from there.
                elif self._sink is None:
                    raise TruncatedStreamError(f"{self._admin.who}: payload before its manifest")
                else:
                    self._sink.write(message.chunk.offset, message.chunk.data)
                    self._on_bytes(self.offset, self._total)
        if not self.complete:
            raise TruncatedStreamError(
                f"{self._admin.who}: stream of {self._digest} ended at byte {self.offset} of {self._total}"
            )

    def store(self, out: Path) -> None:
        """Verify the whole and give it its name. A wrong whole is thrown away. Raises DigestMismatchError."""
        assert self._sink is not None, "stored when complete"
        try:
            self._sink.finish()
        except DigestMismatchError:
            self._sink.discard()
            raise
        self._sink.sync()
        self._sink.close()
        os.replace(self._part, out)

    def close(self) -> None:
        """Close the file, keeping what is there."""
        if self._sink is not None:
            self._sink.close()

    def _open(self, message: "tensor_pb2.Manifest") -> None:
        from fedcore.tensor_stream import TensorSink, manifest_from_proto

        manifest = manifest_from_proto(message)
        if message.digest != self._digest:
            raise DigestMismatchError(
                f"{self._admin.who}: sent artifact {message.digest}, expected {self._digest}"
            )
        if self._sink is None:
            self._total = manifest.payload_bytes
            self._sink = TensorSink(
                self._part, manifest, self._digest, who=str(self._part), require_finite=False
            )
