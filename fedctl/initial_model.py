"""A model that a plan starts from, from any writer of safetensors, in the one form that artifacts have.

The tensors' bytes are copied as they are; nothing here interprets them, so no torch is needed.
"""

import contextlib
import mmap
from pathlib import Path
from typing import Any

from fedcore.errors import StorageError, TensorMismatchError
from fedcore.parsing import parse_json
from fedcore.tensor_file import MAX_HEADER_BYTES, TensorManifest, TensorSpec, read_manifest, write_tensor_file


def canonical_model(path: Path, scratch: Path) -> Path:
    """`path` itself if it is canonical, else `scratch`, with the same tensors written there canonically.

    Metadata are left out, and the order of the writer's. Raises StorageError if the file is damaged or no
    safetensors file, TensorMismatchError for tensors that an artifact can't hold.
    """
    try:
        read_manifest(path)
    except StorageError:
        _rewrite(path, scratch)
        return scratch
    return path


def _rewrite(path: Path, out: Path) -> None:
    """Source of the layout: https://github.com/huggingface/safetensors#format."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= MAX_HEADER_BYTES:
                raise StorageError(f"{path}: not a safetensors file (header of {size} bytes)")
            entries = parse_json(file.read(size))
            if not isinstance(entries, dict):
                raise ValueError(f"its header is {type(entries).__name__}, expected an object")
            entries.pop("__metadata__", None)
            found = {str(name): _entry(str(name), entry) for name, entry in entries.items()}
            manifest = TensorManifest.of(spec for spec, _ in found.values())
            _check_payload(path, found, manifest, path.stat().st_size - 8 - size)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                _write(out, found, mapped, 8 + size)
    except TensorMismatchError as error:
        raise TensorMismatchError(f"{path}: {error.message}", hint=error.hint) from error
    except (OSError, ValueError, OverflowError, KeyError, TypeError) as error:
        raise StorageError(f"{path}: not a safetensors file: {error}") from error


def _write(out: Path, found: dict[str, tuple[TensorSpec, int]], mapped: mmap.mmap, payload: int) -> None:
    """`payload` is where the tensors' bytes begin in the file."""
    with contextlib.ExitStack() as views:  # a mapping with views of it left can't be closed
        whole = views.enter_context(memoryview(mapped))
        parts = {}
        for name, (spec, start) in found.items():
            first = payload + start
            parts[name] = (spec, views.enter_context(whole[first : first + spec.size_bytes]))
        write_tensor_file(out, parts)


def _entry(name: str, entry: Any) -> tuple[TensorSpec, int]:
    """A tensor of the header, and where its bytes start in the payload."""
    spec = TensorSpec(name, str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
    start, end = (int(n) for n in entry["data_offsets"])
    TensorManifest.of([spec])
    if start < 0 or end - start != spec.size_bytes:
        raise ValueError(f"tensor '{name}' has bytes {start} to {end}, expected {spec.size_bytes} of them")
    return spec, start


def _check_payload(
    path: Path, found: dict[str, tuple[TensorSpec, int]], manifest: TensorManifest, length: int
) -> None:
    """Tensors must follow each other without gaps or overlaps, and end with the file."""
    end = 0
    for spec, start in sorted(found.values(), key=lambda item: (item[1], item[0].size_bytes)):
        if start != end:
            raise StorageError(f"{path}: tensor '{spec.name}' starts at byte {start}, expected {end}")
        end += spec.size_bytes
    if end != length or not manifest.tensors:
        raise StorageError(f"{path}: {length} bytes of tensors, expected {end}")
