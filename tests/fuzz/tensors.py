"""Manifests, canonical and foreign tensor files, uploads that go on after what is on the disk."""

import hashlib
import json
import struct
from pathlib import Path

import torch
from google.protobuf.message import DecodeError

from fedcore.errors import (
    DigestMismatchError,
    NonFiniteError,
    StorageError,
    TensorMismatchError,
    TransferError,
)
from fedcore.models.state_file import load_tensors, save_state
from fedcore.raw_chunks import RawChunk
from fedcore.tensor_file import TensorManifest, TensorSpec, read_manifest
from fedcore.tensor_stream import TensorSink, manifest_from_proto, manifest_to_proto
from fedcore.v1 import federation_pb2, tensor_pb2
from fedctl.initial_model import canonical_model
from fedserver.tensor_source import TensorFile
from tests.fuzz.target import BINARY_WORDS, TEXT_WORDS, Target, bounded, only, written

_STATE = {
    "conv.weight": torch.arange(24.0).reshape(2, 3, 2, 2),
    "bn.num_batches_tracked": torch.tensor(7),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "mask": torch.tensor([True, False]),
}
# Headers are parsed into Python's objects, which take a hundred times their text.
_PER_BYTE, _FIXED = 200, 4 << 20


def _canonical() -> list[bytes]:
    canonical = written(lambda path: save_state(path, _STATE))
    return [canonical, _foreign({"w": ("F32", [2], [0, 8])}, bytes(8))]


def _foreign(tensors: dict[str, tuple[str, list[int], list[int]]], payload: bytes) -> bytes:
    """A safetensors file as others write it."""
    header = {name: {"dtype": d, "shape": s, "data_offsets": o} for name, (d, s, o) in tensors.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    return struct.pack("<Q", len(text)) + text + payload


def _with_length(data: bytes) -> bytes:
    """A file whose header's length is right, however its text was mutated: else most examples end there."""
    end = data.find(b"}}")
    if end < 0:
        return struct.pack("<Q", max(0, len(data) - 8)) + data[8:]
    return struct.pack("<Q", max(0, end + 2 - 8)) + data[8:]


def check_file(data: bytes, folder: Path) -> None:
    for number, form in enumerate((data, _with_length(data))):
        path = folder / str(number)
        path.write_bytes(form)
        with only(StorageError), bounded(_FIXED + _PER_BYTE * len(form)):
            manifest, _ = read_manifest(path)
            file = TensorFile.open(path)
            for spec in manifest.tensors:
                file.whole(spec)
            loaded = load_tensors(path)
            # What is read as canonical is written as the same bytes.
            assert save_state(folder / "again", loaded) == hashlib.sha256(form).hexdigest()


def check_foreign_file(data: bytes, folder: Path) -> None:
    for number, form in enumerate((data, _with_length(data))):
        path = folder / str(number)
        path.write_bytes(form)
        with only(StorageError), bounded(_FIXED + _PER_BYTE * len(form)):
            load_tensors(path, canonical=False)
        with only(StorageError, TensorMismatchError), bounded(_FIXED + _PER_BYTE * len(form)):
            read_manifest(canonical_model(path, folder / f"{number}-rewritten"))


def _manifests() -> list[bytes]:
    specs = [
        TensorSpec("conv.weight", "F32", (2, 3, 2, 2)),
        TensorSpec("n", "I64", ()),
        TensorSpec("b", "BF16", (0,)),
    ]
    message = manifest_to_proto(TensorManifest.of(specs), "0" * 64)
    return [message.SerializeToString(), tensor_pb2.Manifest().SerializeToString()]


def check_manifest(data: bytes, folder: Path) -> None:
    try:
        message = tensor_pb2.Manifest.FromString(data)
    except DecodeError:  # gRPC refuses it
        return
    with only(TensorMismatchError), bounded(_FIXED + _PER_BYTE * len(data)):
        manifest = manifest_from_proto(message)
        assert manifest_from_proto(manifest_to_proto(manifest, message.digest)) == manifest
        path = folder / "file"
        path.write_bytes(manifest.header())
        with only(StorageError):  # of a payload that is not there
            assert read_manifest(path)[0] == manifest


def check_chunk(data: bytes, folder: Path) -> None:
    """What receivers make of a chunk's bytes is what a raw chunk makes of what they hold."""
    try:
        part = federation_pb2.DeliverPart.FromString(data)
    except DecodeError:
        return
    if part.WhichOneof("part") == "chunk":
        wire = RawChunk(part.chunk.offset, part.chunk.data).to_wire()
        assert federation_pb2.DeliverPart.FromString(wire).chunk.data == part.chunk.data
        assert federation_pb2.DeliverPart.FromString(wire).chunk.offset == part.chunk.offset


_SPECS = TensorManifest.of(
    [TensorSpec("w", "F32", (6,)), TensorSpec("n", "I64", (2,)), TensorSpec("h", "BF16", (3,))]
)
_PAYLOAD = struct.pack("<qq", 3, -1) + struct.pack("<6f", *range(6)) + b"\x80\x3f" * 3


def check_what_is_on_the_disk(data: bytes, folder: Path) -> None:
    """Whatever lies where an upload goes on: what is finished is whole, or said not to be."""
    path = folder / "part"
    path.write_bytes(data)
    digest = hashlib.sha256(_SPECS.header() + _PAYLOAD).hexdigest()
    sink = TensorSink(path, _SPECS, digest, who="site-07 round 12", require_finite=True)
    try:
        assert 0 <= sink.offset <= len(_PAYLOAD)
        sink.write(sink.offset, _PAYLOAD[sink.offset :])
        with only(DigestMismatchError):
            sink.finish()
            assert path.read_bytes() == _SPECS.header() + _PAYLOAD
    finally:
        sink.close()


def check_stream(data: bytes, folder: Path) -> None:
    """Chunks as the bytes say: an offset and a length each. A refused one changes nothing, and the stream goes on."""
    path = folder / "part"
    payload = (_PAYLOAD + data)[: len(data)]
    digest = hashlib.sha256(_SPECS.header() + _PAYLOAD).hexdigest()
    sink = TensorSink(path, _SPECS, digest, who="site-07 round 12", require_finite=True)
    try:
        for at in range(0, min(len(data), 64), 2):
            offset, length = data[at] % 64, data[at + 1 : at + 2]
            before = sink.offset
            chunk = payload[offset : offset + (length[0] % 64 if length else 0)]
            try:
                sink.write(offset, chunk)
            except (TransferError, NonFiniteError):
                assert sink.offset == before
        with only(TransferError):
            sink.write(sink.offset, _PAYLOAD[sink.offset :])
            sink.finish()
            assert path.read_bytes() == _SPECS.header() + _PAYLOAD
    finally:
        sink.close()


_WORDS = (
    *TEXT_WORDS, *BINARY_WORDS, b'"shape":[', b'"dtype":"F8_E4M3"', b'"data_offsets":[', b"[0,0]", b"[1e400]", b"Infinity]",
    b"I64", b"BOOL", b"__metadata__", b"}}",
)  # fmt: skip
TARGETS = [
    Target("tensor_file", check_file, _canonical, _WORDS),
    Target("foreign_tensor_file", check_foreign_file, _canonical, _WORDS),
    Target("manifest", check_manifest, _manifests, BINARY_WORDS),
    Target(
        "chunk",
        check_chunk,
        lambda: [RawChunk(8, b"12345678").to_wire(), RawChunk(0, b"").to_wire()],
        BINARY_WORDS,
    ),
    Target("partial_file", check_what_is_on_the_disk, lambda: [_SPECS.header() + _PAYLOAD], BINARY_WORDS),
    Target("stream", check_stream, lambda: [bytes([0, 16, 16, 24, 40, 6]), _PAYLOAD], BINARY_WORDS),
]
