"""From a stream to a file: whatever the chunks and cuts, the same file; whatever is wrong, refused by name."""

import hashlib
import random
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import (
    DigestMismatchError,
    DiskError,
    NonFiniteError,
    TensorMismatchError,
    TransferError,
    TruncatedStreamError,
)
from fedcore.tensor_file import TensorManifest, TensorSpec, read_manifest, write_tensor_file
from fedcore.tensor_stream import (
    CHUNK_BYTES,
    TensorSink,
    check_digest_form,
    manifest_from_proto,
    manifest_to_proto,
    read_payload,
    resumable_bytes,
)

FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
dtypes = st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "I32", "I8", "U8", "BOOL"])


def encode(dtype: str, count: int, seed: int) -> bytes:
    draw = np.random.default_rng(seed)
    if dtype == "BF16":
        return (draw.normal(size=count).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    if dtype in FLOATS:
        return draw.normal(size=count).astype(FLOATS[dtype]).tobytes()
    size = TensorSpec("", dtype, (count,)).size_bytes
    return draw.bytes(size)


@st.composite
def artifacts(draw: st.DrawFn) -> tuple[TensorManifest, bytes, str]:
    """A manifest, its payload and digest; tensors of all dtypes, empty ones too."""
    shapes = draw(st.lists(st.tuples(dtypes, st.integers(0, 40)), min_size=1, max_size=6))
    specs = [TensorSpec(f"t{n}", dtype, (count,)) for n, (dtype, count) in enumerate(shapes)]
    manifest = TensorManifest.of(specs)
    payload = b"".join(encode(spec.dtype, spec.shape[0], n) for n, spec in enumerate(manifest.tensors))
    return manifest, payload, hashlib.sha256(manifest.header() + payload).hexdigest()


def open_sink(path: Path, manifest: TensorManifest, digest: str) -> TensorSink:
    return TensorSink(path, manifest, digest, who="site-07 round 12", require_finite=True)


def write_all(sink: TensorSink, payload: bytes, step: int) -> None:
    while not sink.complete:
        sink.write(sink.offset, payload[sink.offset : sink.offset + step])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sink")


@given(artifacts(), st.integers(0, 2**32))
def test_any_chunking_any_cuts_give_the_same_file(
    folder: Path, artifact: tuple[TensorManifest, bytes, str], seed: int
) -> None:
    manifest, payload, digest = artifact
    draw, cuts = random.Random(seed), 6
    path = folder / "part"
    path.unlink(missing_ok=True)
    sink = open_sink(path, manifest, digest)
    while not sink.complete:
        step = 8 * draw.randint(1, 1 + len(payload) // 8)
        sink.write(sink.offset, payload[sink.offset : sink.offset + step])
        if cuts and draw.random() < 0.4:  # cut; a crash may leave the file at any length
            cuts -= 1
            sink.close()
            length = path.stat().st_size
            with path.open("r+b") as file:
                file.truncate(draw.randint(0, length) if draw.random() < 0.5 else length)
            before = sink.offset
            sink = open_sink(path, manifest, digest)
            assert sink.offset <= before
            assert sink.offset % 8 == 0 or sink.complete
    sink.finish()
    sink.sync()
    sink.close()
    assert path.read_bytes() == manifest.header() + payload
    assert read_manifest(path)[0] == manifest


@given(artifacts().filter(lambda a: len(a[1]) > 0), st.data())
def test_a_flipped_bit_anywhere_is_found(
    folder: Path, artifact: tuple[TensorManifest, bytes, str], data: st.DataObject
) -> None:
    manifest, payload, digest = artifact
    at = data.draw(st.integers(0, len(payload) - 1))
    broken = bytearray(payload)
    broken[at] ^= 1 << data.draw(st.integers(0, 7))
    path = folder / "flipped"
    sink = TensorSink(path, manifest, digest, who="site-07 round 12", require_finite=False)
    sink.write(0, bytes(broken))
    with pytest.raises(DigestMismatchError, match=r"site-07 round 12: digest of the bytes is .*, expected"):
        sink.finish()
    sink.discard()
    assert not path.exists()


@given(st.sampled_from(["F64", "F32", "F16", "BF16"]), st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_nan_or_inf_anywhere_is_refused_by_name_and_not_written(
    folder: Path, dtype: str, value: float, data: st.DataObject
) -> None:
    specs = [
        TensorSpec("before", "I64", (3,)),
        TensorSpec("poisoned", dtype, (16,)),
        TensorSpec("zafter", "F16", (4,)),
    ]
    manifest = TensorManifest.of(specs)
    at = data.draw(st.integers(0, 15))
    tensor = bytearray(encode(dtype, 16, 0))
    number = (
        (np.array([value], np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        if dtype == "BF16"
        else FLOATS[dtype](value).tobytes()
    )
    tensor[at * len(number) : (at + 1) * len(number)] = number
    parts = {"before": b"\xff" * 24, "poisoned": bytes(tensor), "zafter": encode("F16", 4, 1)}
    payload = b"".join(parts[spec.name] for spec in manifest.tensors)
    path = folder / "nan"
    path.unlink(missing_ok=True)
    sink = open_sink(path, manifest, "0" * 64)
    step = 8 * data.draw(st.integers(1, 8))
    with pytest.raises(
        NonFiniteError, match="site-07 round 12: tensor 'poisoned' holds NaN or Inf; update discarded"
    ):
        write_all(sink, payload, step)
    assert path.stat().st_size == len(manifest.header()) + sink.offset
    sink.close()


@pytest.mark.parametrize("floats", [1, 3, 255])
def test_a_whole_payload_that_is_not_aligned_is_resumed_as_whole(tmp_path: Path, floats: int) -> None:
    """Killed between the last chunk and the rename: the sender must not be asked for half of a number pair."""
    manifest = TensorManifest.of([TensorSpec("w", "F32", (floats,))])
    payload = np.arange(floats, dtype=np.float32).tobytes()
    digest = hashlib.sha256(manifest.header() + payload).hexdigest()
    first = open_sink(tmp_path / "part", manifest, digest)
    first.write(0, payload)
    first.close()
    assert resumable_bytes((tmp_path / "part").stat().st_size, manifest) == len(payload)
    again = open_sink(tmp_path / "part", manifest, digest)
    assert again.complete
    again.finish()
    again.close()
    assert resumable_bytes(len(manifest.header()) + len(payload) - 1, manifest) % 8 == 0


def test_integers_that_look_like_nan_and_lenient_sinks_are_fine(tmp_path: Path) -> None:
    manifest = TensorManifest.of([TensorSpec("n", "I64", (2,)), TensorSpec("u", "U8", (8,))])
    sink = open_sink(tmp_path / "a", manifest, "0" * 64)
    sink.write(0, b"\xff" * 24)
    sink.close()
    floats = TensorManifest.of([TensorSpec("w", "F32", (2,))])
    sink = TensorSink(tmp_path / "b", floats, "0" * 64, who="w", require_finite=False)
    sink.write(0, b"\xff" * 8)
    sink.close()


def test_chunks_that_do_not_fit_are_refused_and_change_nothing(tmp_path: Path) -> None:
    manifest = TensorManifest.of([TensorSpec("w", "F32", (10,))])
    payload = encode("F32", 10, 0)
    digest = hashlib.sha256(manifest.header() + payload).hexdigest()
    sink = open_sink(tmp_path / "f", manifest, digest)
    sink.write(0, payload[:16])
    for offset, data, kind, words in (
        (24, payload[24:32], TruncatedStreamError, "chunk at byte 24, expected byte 16"),
        (8, payload[8:16], TruncatedStreamError, "chunk at byte 8, expected byte 16"),
        (-8, payload[:8], TruncatedStreamError, "chunk at byte -8"),
        (16, payload[16:20], TruncatedStreamError, "not a multiple of 8"),
        (16, bytes(32), TensorMismatchError, "48 bytes of payload, expected 40"),
    ):
        with pytest.raises(kind, match=words):
            sink.write(offset, data)
    with pytest.raises(TruncatedStreamError, match="stream ended after 16 of 40 bytes"):
        sink.finish()
    sink.write(16, b"")
    sink.write(16, payload[16:])
    sink.finish()
    sink.close()


def test_a_part_of_another_artifact_or_a_damaged_one_is_begun_again(tmp_path: Path) -> None:
    manifest = TensorManifest.of([TensorSpec("w", "F32", (10,))])
    payload = encode("F32", 10, 0)
    digest = hashlib.sha256(manifest.header() + payload).hexdigest()
    nan = np.full(4, np.nan, np.float32).tobytes()
    for left in (b"x", b"\0" * 500, manifest.header()[:-1], manifest.header() + nan):
        (tmp_path / "f").write_bytes(left)
        sink = open_sink(tmp_path / "f", manifest, digest)
        assert sink.offset == 0
        sink.write(0, payload)
        sink.finish()
        sink.close()
        assert (tmp_path / "f").read_bytes() == manifest.header() + payload
    (tmp_path / "f").write_bytes(manifest.header() + payload + b"more")
    sink = open_sink(tmp_path / "f", manifest, digest)
    assert sink.complete
    sink.finish()
    sink.close()
    assert (tmp_path / "f").read_bytes() == manifest.header() + payload


@given(artifacts())
def test_a_manifest_survives_the_wire(artifact: tuple[TensorManifest, bytes, str]) -> None:
    manifest, payload, digest = artifact
    message = manifest_to_proto(manifest, digest)
    assert manifest_from_proto(type(message).FromString(message.SerializeToString())) == manifest
    assert message.payload_bytes == len(payload)


def test_a_manifest_of_an_unknown_dtype_is_refused() -> None:
    message = manifest_to_proto(TensorManifest.of([TensorSpec("w", "F32", (1,))]), "0" * 64)
    message.tensors[0].dtype = 0
    with pytest.raises(TensorMismatchError, match="unknown dtype 'UNSPECIFIED'"):
        manifest_from_proto(message)
    message.tensors[0].dtype = 99  # type: ignore[assignment]
    with pytest.raises(TensorMismatchError, match="unknown dtype '99'"):
        manifest_from_proto(message)


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "../" + "0" * 61])
def test_digests_have_one_form(tmp_path: Path, digest: str) -> None:
    with pytest.raises(TransferError, match="is not a SHA-256 digest"):
        check_digest_form(digest)
    with pytest.raises(TransferError):
        open_sink(tmp_path / "never", TensorManifest.of([]), digest)
    assert not (tmp_path / "never").exists()


def test_payload_is_read_in_chunks_from_any_offset(tmp_path: Path) -> None:
    payload = random.Random(0).randbytes(CHUNK_BYTES + 1000)
    spec = TensorSpec("w", "U8", (len(payload),))
    write_tensor_file(tmp_path / "f", {"w": (spec, payload)})
    _, start = read_manifest(tmp_path / "f")
    assert [len(chunk) for chunk in read_payload(tmp_path / "f", start, 0)] == [CHUNK_BYTES, 1000]
    assert b"".join(read_payload(tmp_path / "f", start, 504)) == payload[504:]
    assert list(read_payload(tmp_path / "f", start, len(payload))) == []


def test_a_disk_that_takes_a_part_of_a_write_is_asked_for_the_rest(tmp_path: Path) -> None:
    manifest = TensorManifest.of([TensorSpec("w", "F32", (64,))])
    payload = encode("F32", 64, 1)
    digest = hashlib.sha256(manifest.header() + payload).hexdigest()
    sink = open_sink(tmp_path / "part", manifest, digest)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(manifest.header()) + 100, limits[1]))
    try:
        with pytest.raises(DiskError, match="too large"):
            sink.write(0, payload)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        sink.close()
    again = open_sink(tmp_path / "part", manifest, digest)
    assert 0 < again.offset < len(payload)
    write_all(again, payload, 64)
    again.finish()
    again.close()
    assert (tmp_path / "part").read_bytes() == manifest.header() + payload
