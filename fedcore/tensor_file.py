"""Named tensors as one canonical safetensors file, and what can be known of it without reading tensors.

Canonical: no metadata, header keys in the manifest's order (larger dtypes first, then by name), compact JSON
padded with spaces to 8 bytes. The same tensors give the same bytes in every process, so the SHA-256 of the file is
their digest and `sha256sum` checks it. Format: https://github.com/huggingface/safetensors#format

No torch here: the control processes use this module. bf16 is known by name and never interpreted.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedcore.errors import StorageError, TensorMismatchError
from fedcore.parsing import parse_json

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
# Begins the names of tensors that an update carries beside the model's (SCAFFOLD's variates).
EXTRA_PREFIX = "aux/"
MAX_TENSORS = 100_000
MAX_NAME_CHARS = 512
MAX_DIMENSIONS = 16
MAX_HEADER_BYTES = 64 << 20
MAX_PAYLOAD_BYTES = 1 << 40


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype (safetensors' names) and shape of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's payload."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorManifest:
    """The tensors of an artifact in canonical order. Build with `of`, which checks and sorts."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, specs: Iterable[TensorSpec]) -> Self:
        """Check specs and bring them into canonical order. Raises TensorMismatchError."""
        tensors = tuple(specs)
        check_specs(tensors)
        return cls(tuple(sorted(tensors, key=lambda spec: (-DTYPE_BYTES[spec.dtype], spec.name))))

    @property
    def payload_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(spec.size_bytes for spec in self.tensors)

    def header(self) -> bytes:
        """The file's first bytes: length of the JSON, then the JSON."""
        entries: dict[str, Any] = {}
        end = 0
        for spec in self.tensors:
            start, end = end, end + spec.size_bytes
            entries[spec.name] = {
                "dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, end],
            }  # fmt: skip
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def offsets(self) -> dict[str, tuple[int, int]]:
        """Start and end of each tensor within the payload."""
        result = {}
        end = 0
        for spec in self.tensors:
            start, end = end, end + spec.size_bytes
            result[spec.name] = (start, end)
        return result


def check_specs(specs: Iterable[TensorSpec]) -> None:
    """Check names, dtypes, shapes and sizes before anything is allocated. Raises TensorMismatchError."""
    seen: set[str] = set()
    total = 0
    for spec in specs:
        label = f"tensor {spec.name[:80]!r}"
        if not 0 < len(spec.name) <= MAX_NAME_CHARS or not spec.name.isprintable():
            raise TensorMismatchError(f"{label}: name must be 1-{MAX_NAME_CHARS} printable characters")
        if spec.name == "__metadata__":
            raise TensorMismatchError(f"{label}: reserved name")
        if spec.name in seen:
            raise TensorMismatchError(f"{label}: named twice")
        seen.add(spec.name)
        if len(seen) > MAX_TENSORS:
            raise TensorMismatchError(f"more than {MAX_TENSORS} tensors")
        if spec.dtype not in DTYPE_BYTES:
            raise TensorMismatchError(f"{label}: unknown dtype {spec.dtype!r}")
        if len(spec.shape) > MAX_DIMENSIONS or any(n < 0 for n in spec.shape):
            raise TensorMismatchError(f"{label}: shape {list(spec.shape)[:20]} is not valid")
        total += spec.size_bytes
        if total > MAX_PAYLOAD_BYTES:
            raise TensorMismatchError(f"{label}: more than {MAX_PAYLOAD_BYTES} bytes in all")


def check_expected(got: TensorManifest, expected: TensorManifest, who: str) -> None:
    """Check that an artifact has exactly the expected tensors.

    `who` opens the message: "site-07 round 12". Raises TensorMismatchError that names the first difference.
    """
    got_by_name = {spec.name: spec for spec in got.tensors}
    expected_by_name = {spec.name: spec for spec in expected.tensors}
    for name, spec in expected_by_name.items():
        other = got_by_name.get(name)
        if other is None:
            raise TensorMismatchError(
                f"{who}: tensor '{name}' is missing ({len(got_by_name)} tensors, expected {len(expected_by_name)})"
            )
        if other.shape != spec.shape:
            raise TensorMismatchError(
                f"{who}: tensor '{name}' has shape {list(other.shape)}, expected {list(spec.shape)}"
            )
        if other.dtype != spec.dtype:
            raise TensorMismatchError(
                f"{who}: tensor '{name}' has dtype {other.dtype}, expected {spec.dtype}"
            )
    for name in got_by_name:
        if name not in expected_by_name:
            raise TensorMismatchError(f"{who}: tensor '{name}' is not expected")


def write_tensor_file(
    path: Path, tensors: Mapping[str, tuple[TensorSpec, bytes | bytearray | memoryview]]
) -> str:
    """Write tensors to `path`, not fsynced, and return the digest.

    `tensors` maps a name to its spec and its bytes (C order, little endian). Raises TensorMismatchError if a
    buffer has another size than its spec.
    """
    manifest = TensorManifest.of(spec for spec, _ in tensors.values())
    digest = hashlib.sha256()
    with path.open("wb") as file:
        header = manifest.header()
        digest.update(header)
        file.write(header)
        for spec in manifest.tensors:
            view = memoryview(tensors[spec.name][1]).cast("B")
            if view.nbytes != spec.size_bytes:
                raise TensorMismatchError(
                    f"tensor '{spec.name}' has {view.nbytes} bytes, expected {spec.size_bytes}"
                )
            digest.update(view)
            file.write(view)
    return digest.hexdigest()


def read_manifest(path: Path) -> tuple[TensorManifest, int]:
    """Read the header of a canonical file: its manifest and where the payload starts.

    Raises StorageError if the file is not canonical or not as long as its header says.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= MAX_HEADER_BYTES:
                raise StorageError(f"{path}: not a safetensors file (header of {size} bytes)")
            text = file.read(size)
            length = os.fstat(file.fileno()).st_size
        entries = parse_json(text)
        manifest = TensorManifest.of(
            TensorSpec(str(name), str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
            for name, entry in entries.items()
        )
    except (
        OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError, TensorMismatchError,
    ) as error:  # fmt: skip
        raise StorageError(f"{path}: not a canonical safetensors file: {error}") from error
    if manifest.header() != size.to_bytes(8, "little") + text:
        raise StorageError(f"{path}: safetensors header is not in canonical form")
    if length != 8 + size + manifest.payload_bytes:
        raise StorageError(f"{path}: {length} bytes, expected {8 + size + manifest.payload_bytes}")
    return manifest, 8 + size
