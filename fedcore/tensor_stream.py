"""Artifacts <-> chunks. The receiver checks the manifest before it allocates, and each byte before it counts.

A sink writes a canonical tensor file from a stream: the header from the checked manifest, the payload from chunks
without gaps, hashing (and looking for NaN and Inf) as they come. It can be reopened after a crash: what stands in the
file is hashed again and the sender goes on from there.
"""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fedcore.durability import sync_data
from fedcore.errors import (
    DigestMismatchError,
    DiskError,
    NonFiniteError,
    TensorMismatchError,
    TransferError,
    TruncatedStreamError,
)
from fedcore.tensor_file import TensorManifest, TensorSpec
from fedcore.v1 import tensor_pb2

CHUNK_BYTES = 1 << 20
_REHASH_BYTES = 4 << 20
# Chunks begin at multiples of this, so that no number is cut in two.
_ALIGNMENT = 8


def manifest_to_proto(manifest: TensorManifest, digest: str) -> tensor_pb2.Manifest:
    """The manifest as it travels."""
    return tensor_pb2.Manifest(
        tensors=[
            tensor_pb2.TensorSpec(
                name=spec.name,
                dtype=tensor_pb2.DType.Value(f"DTYPE_{spec.dtype}"),
                shape=spec.shape,
                size_bytes=spec.size_bytes,
            )
            for spec in manifest.tensors
        ],
        payload_bytes=manifest.payload_bytes,
        digest=digest,
    )


def manifest_from_proto(message: tensor_pb2.Manifest) -> TensorManifest:
    """Check a received manifest: names, dtypes, shapes, order, sizes, sum. Raises TensorMismatchError."""
    specs = []
    for tensor in message.tensors:
        try:
            dtype = tensor_pb2.DType.Name(tensor.dtype).removeprefix("DTYPE_")
        except ValueError:
            dtype = str(int(tensor.dtype))
        specs.append(TensorSpec(tensor.name, dtype, tuple(tensor.shape)))
    manifest = TensorManifest.of(specs)
    if manifest.tensors != tuple(specs):
        raise TensorMismatchError(
            "manifest: tensors are not in canonical order (larger dtypes first, then by name)"
        )
    for spec, tensor in zip(manifest.tensors, message.tensors, strict=True):
        if tensor.size_bytes != spec.size_bytes:
            raise TensorMismatchError(
                f"tensor '{spec.name}' declares {tensor.size_bytes} bytes, "
                f"expected {spec.size_bytes} for {spec.dtype} {list(spec.shape)}"
            )
    if message.payload_bytes != manifest.payload_bytes:
        raise TensorMismatchError(
            f"manifest declares {message.payload_bytes} bytes, its tensors have {manifest.payload_bytes}"
        )
    return manifest


def check_digest_form(digest: str) -> str:
    """Return `digest` if it is a lower-case hex SHA-256. Raises TransferError."""
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise TransferError(f"{digest[:80]!r} is not a SHA-256 digest (64 lower-case hex digits)")
    return digest


def read_payload(path: Path, start: int, offset: int) -> Iterator[bytes]:
    """Yield the payload of a tensor file from `offset` in chunks; `start` is where the payload begins."""
    with path.open("rb", buffering=0) as file:
        file.seek(start + offset)
        while data := file.read(CHUNK_BYTES):
            yield data


def resumable_bytes(file_bytes: int, manifest: TensorManifest) -> int:
    """Payload bytes of a partial tensor file that a stream goes on after: whole numbers, or the whole payload."""
    size = manifest.payload_bytes
    kept = min(max(0, file_bytes - len(manifest.header())), size)
    return kept if kept == size else kept - kept % _ALIGNMENT


class TensorSink:
    """Writes one artifact's bytes, in order, into `path`. Not thread-safe: one stream feeds it."""

    def __init__(
        self, path: Path, manifest: TensorManifest, digest: str, *, who: str, require_finite: bool
    ) -> None:
        """Open `path`, going on after what an earlier stream of the same artifact left there.

        `who` opens every message: "site-07 round 12". Raises DiskError.
        """
        self.path = path
        self._manifest = manifest
        self._digest = check_digest_form(digest)
        self._who = who
        self._size = manifest.payload_bytes
        self._header = manifest.header()
        self._hash = hashlib.sha256(self._header)
        self._ends: list[int] = []
        self._finite_views: list[str | None] = []
        if require_finite:
            self._prepare_finite_check()
        with self._disk():
            self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
            try:
                self.offset = self._recover()
            except BaseException:
                self._file.close()
                raise

    @property
    def complete(self) -> bool:
        """Whether all payload is there."""
        return self.offset == self._size

    def write(self, offset: int, data: bytes) -> None:
        """Append a chunk. Raises TruncatedStreamError on a gap, TensorMismatchError if too long, NonFiniteError,
        DiskError.
        """
        if offset != self.offset:
            raise TruncatedStreamError(f"{self._who}: chunk at byte {offset}, expected byte {self.offset}")
        end = offset + len(data)
        if end > self._size:
            raise TensorMismatchError(f"{self._who}: {end} bytes of payload, expected {self._size}")
        if end % _ALIGNMENT and end != self._size:
            raise TruncatedStreamError(
                f"{self._who}: chunk ends at byte {end}, not a multiple of {_ALIGNMENT}"
            )
        self._check_finite(offset, data)
        with self._disk():
            self._write(data)
        self._hash.update(data)
        self.offset = end

    def sync(self) -> None:
        """Make what was written durable. Raises DiskError."""
        with self._disk():
            sync_data(self._file.fileno())

    def finish(self) -> None:
        """Check completeness and digest. Raises TruncatedStreamError, DigestMismatchError."""
        if not self.complete:
            raise TruncatedStreamError(
                f"{self._who}: stream ended after {self.offset} of {self._size} bytes",
                hint="the sender resumes from the durable offset",
            )
        got = self._hash.hexdigest()
        if got != self._digest:
            raise DigestMismatchError(f"{self._who}: digest of the bytes is {got}, expected {self._digest}")

    def close(self) -> None:
        """Close the file, keeping what is there."""
        self._file.close()

    def discard(self) -> None:
        """Close and delete the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def _recover(self) -> int:
        """Hash what an earlier stream left; start afresh if it is not the beginning of this artifact."""
        length = os.fstat(self._file.fileno()).st_size
        kept = resumable_bytes(length, self._manifest)
        if kept <= 0 or self._file.read(len(self._header)) != self._header:
            return self._start_afresh()
        self._file.truncate(len(self._header) + kept)
        offset = 0
        while offset < kept:
            data = self._file.read(_REHASH_BYTES)
            try:
                self._check_finite(offset, data)
            except NonFiniteError:  # damaged on this disk: a stream is checked before it is written
                return self._start_afresh()
            self._hash.update(data)
            offset += len(data)
        return kept

    def _start_afresh(self) -> int:
        self._file.seek(0)
        self._file.truncate()
        self._write(self._header)
        self._hash = hashlib.sha256(self._header)
        return 0

    def _write(self, data: bytes) -> None:
        """Write all of it: a disk that is all but full takes a part of a write without an error."""
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Say of a disk that takes no more, that it does not: the sender keeps its bytes and tries again."""
        try:
            yield
        except OSError as error:
            raise DiskError(
                f"{self._who}: {self.path} can't be written: {error.strerror}",
                hint="free space or mend the disk; the sender tries again by itself",
            ) from error

    def _prepare_finite_check(self) -> None:
        end = 0
        for spec in self._manifest.tensors:
            end += spec.size_bytes
            self._ends.append(end)
            self._finite_views.append(spec.dtype if spec.dtype in ("F64", "F32", "F16", "BF16") else None)

    def _check_finite(self, offset: int, data: bytes) -> None:
        if not self._ends:
            return
        view = memoryview(data)
        index = bisect_right(self._ends, offset)
        start, end = offset, offset + len(data)
        while start < end:
            stop = min(self._ends[index], end)
            dtype = self._finite_views[index]
            if (
                dtype is not None
                and stop > start
                and not _finite(view[start - offset : stop - offset], dtype)
            ):
                name = self._manifest.tensors[index].name
                raise NonFiniteError(
                    f"{self._who}: tensor '{name}' holds NaN or Inf; update discarded",
                    hint="lower the learning rate, or look at the site's data",
                )
            start = stop
            index += 1


def _finite(data: memoryview, dtype: str) -> bool:
    if dtype == "BF16":  # numpy has no bf16: NaN and Inf have all exponent bits set
        bits = np.frombuffer(data, np.uint16)
        return not bool(((bits & 0x7F80) == 0x7F80).any())
    kind = {"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype]
    return bool(np.isfinite(np.frombuffer(data, kind)).all())
