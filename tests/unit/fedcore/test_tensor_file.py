"""Canonical tensor files: the same tensors give the same bytes; what can't be is refused before anything is allocated."""

import hashlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import StorageError, TensorMismatchError
from fedcore.tensor_file import (
    DTYPE_BYTES,
    MAX_TENSORS,
    TensorManifest,
    TensorSpec,
    check_expected,
    check_specs,
    read_manifest,
    write_tensor_file,
)

names = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
specs = st.lists(
    st.builds(
        TensorSpec,
        names,
        st.sampled_from(sorted(DTYPE_BYTES)),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    unique_by=lambda spec: spec.name,
    max_size=6,
)


def filled(tensors: list[TensorSpec], seed: int = 0) -> dict[str, tuple[TensorSpec, bytes]]:
    draw = random.Random(seed)
    return {spec.name: (spec, draw.randbytes(spec.size_bytes)) for spec in tensors}


@given(specs, st.integers(0, 2**32))
def test_order_of_the_tensors_does_not_matter_and_the_file_reads_back(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[TensorSpec], seed: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    content = filled(tensors)
    digest = write_tensor_file(folder / "a", content)
    shuffled = list(content.items())
    random.Random(seed).shuffle(shuffled)
    assert write_tensor_file(folder / "b", dict(shuffled)) == digest
    assert hashlib.sha256((folder / "b").read_bytes()).hexdigest() == digest
    manifest, start = read_manifest(folder / "a")
    assert set(manifest.tensors) == set(tensors)
    assert start % 8 == 0
    data = (folder / "a").read_bytes()[start:]
    for name, (begin, end) in manifest.offsets().items():
        assert data[begin:end] == content[name][1]
        assert begin % DTYPE_BYTES[content[name][0].dtype] == 0


def test_plain_safetensors_opens_the_file(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    spec = TensorSpec("größe.weight", "F32", (2, 3))
    scalar = TensorSpec("n", "I64", ())
    one = (7).to_bytes(8, "little")
    write_tensor_file(tmp_path / "m.safetensors", {spec.name: (spec, values.tobytes()), "n": (scalar, one)})
    loaded = load_file(tmp_path / "m.safetensors")
    assert set(loaded) == {"größe.weight", "n"}
    np.testing.assert_array_equal(loaded["größe.weight"], values)
    assert int(loaded["n"]) == 7


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ([TensorSpec("w", "F32", (2**62, 2**62))], "more than .* bytes in all"),
        ([TensorSpec("w", "F64", (2**40,)), TensorSpec("v", "F64", (2**40,))], "more than .* bytes in all"),
        ([TensorSpec("w", "F32", (3, -1))], r"shape \[3, -1\] is not valid"),
        ([TensorSpec("w", "F32", (1,) * 17)], "is not valid"),
        ([TensorSpec("w", "F32", (1,)), TensorSpec("w", "F32", (2,))], "tensor 'w': named twice"),
        ([TensorSpec("w", "F33", (1,))], "unknown dtype 'F33'"),
        ([TensorSpec("", "F32", (1,))], "name must be"),
        ([TensorSpec("a\nb", "F32", (1,))], "name must be"),
        ([TensorSpec("a" * 513, "F32", (1,))], "name must be"),
        ([TensorSpec("__metadata__", "F32", (1,))], "reserved name"),
        ([TensorSpec(f"t{n}", "U8", ()) for n in range(MAX_TENSORS + 1)], "more than 100000 tensors"),
    ],
)  # fmt: skip
def test_specs_that_cannot_be_are_refused(tensors: list[TensorSpec], words: str) -> None:
    with pytest.raises(TensorMismatchError, match=words):
        check_specs(tensors)


def test_check_expected_names_the_first_difference() -> None:
    expected = TensorManifest.of([TensorSpec("w", "F32", (2, 3)), TensorSpec("b", "F32", (3,))])
    check_expected(TensorManifest.of(reversed(expected.tensors)), expected, "site-07 round 12")
    for change, words in (
        (
            [TensorSpec("w", "F32", (3, 2)), TensorSpec("b", "F32", (3,))],
            r"'w' has shape \[3, 2\], expected \[2, 3\]",
        ),
        ([TensorSpec("w", "F16", (2, 3)), TensorSpec("b", "F32", (3,))], "'w' has dtype F16, expected F32"),
        ([TensorSpec("w", "F32", (2, 3))], r"'b' is missing \(1 tensors, expected 2\)"),
        ([*expected.tensors, TensorSpec("x", "F32", ())], "'x' is not expected"),
    ):
        with pytest.raises(TensorMismatchError, match=f"site-07 round 12: tensor {words}"):
            check_expected(TensorManifest.of(change), expected, "site-07 round 12")


def test_a_buffer_of_another_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorMismatchError, match="tensor 'w' has 7 bytes, expected 8"):
        write_tensor_file(tmp_path / "f", {"w": (TensorSpec("w", "F32", (2,)), b"1234567")})


def _file(header: object, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload


ENTRY = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        b"\0" * 64,
        b"\xff" * 64,
        _file(b"no json!"),
        _file([1, 2]),
        _file({"w": {"dtype": "U8"}}),
        _file({"w": {**ENTRY, "shape": ["x"]}}, b"12345678"),
        _file({"w": {**ENTRY, "shape": [2**70]}}, b"12345678"),
        _file({"w": {**ENTRY, "data_offsets": [8, 16]}}, b"12345678"),
        _file({"w": ENTRY, "__metadata__": {}}, b"12345678"),
        _file({"w": {"shape": [8], "dtype": "U8", "data_offsets": [0, 8]}}, b"12345678"),
        _file({"w": ENTRY}, b"1234567"),
        _file({"w": ENTRY}, b"123456789"),
        _file(b"[" * 5000),
        _file(b'{"w":{"dtype":"U8","shape":[1e999],"data_offsets":[0,8]}}', b"12345678"),
    ],
    ids=range(16),
)
def test_files_that_are_not_canonical_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(StorageError, match=str(tmp_path / "f")):
        read_manifest(tmp_path / "f")


def test_the_canonical_form_of_those_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(_file({"w": ENTRY}, b"12345678"))
    assert read_manifest(tmp_path / "f")[0].tensors == (TensorSpec("w", "U8", (8,)),)
    with pytest.raises(StorageError):
        read_manifest(tmp_path / "missing")
