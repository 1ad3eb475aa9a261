"""State dicts and other named tensors to and from canonical safetensors files (`fedcore.tensor_file`)."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedcore.errors import StorageError, TensorMismatchError
from fedcore.tensor_file import TensorManifest, TensorSpec, read_manifest, write_tensor_file

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def specs_of(state: Mapping[str, Tensor]) -> list[TensorSpec]:
    """Name, dtype and shape of each tensor, in the mapping's order. Raises TensorMismatchError."""
    for name, tensor in state.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise TensorMismatchError(f"tensor '{name}' has dtype {tensor.dtype}, which artifacts can't hold")
    return [
        TensorSpec(name, _DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in state.items()
    ]


def save_state(path: Path, state: Mapping[str, Tensor]) -> str:
    """Write tensors to a canonical file, not fsynced, and return its digest (the file's SHA-256).

    What lies contiguous in the CPU's memory is written without a copy. Raises TensorMismatchError.
    """
    return write_tensor_file(
        path, {spec.name: (spec, _bytes_of(state[spec.name])) for spec in specs_of(state)}
    )


def load_tensors(path: Path, *, canonical: bool = True) -> dict[str, Tensor]:
    """Read a file's tensors into the CPU's memory.

    `canonical=False` also takes safetensors files of other writers (an operator's initial model), whose
    bytes have no digest of ours. Raises StorageError if the file is damaged, or not canonical where it
    should be.
    """
    if canonical:
        read_manifest(path)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: not a safetensors file: {error}") from error
    return tensors


def load_intact(path: Path, digest: str) -> dict[str, Tensor]:
    """Read a canonical file's tensors, which must be those that the digest names. It is taken of what was read.

    Raises StorageError if the file is missing, damaged or another.
    """
    tensors = load_tensors(path)
    manifest = TensorManifest.of(specs_of(tensors))
    found = hashlib.sha256(manifest.header())
    for spec in manifest.tensors:
        found.update(_bytes_of(tensors[spec.name]))
    if found.hexdigest() != digest:
        raise StorageError(f"{path}: is no longer artifact {digest[:12]}")
    return tensors


def _bytes_of(tensor: Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(b"")
    # Viewed as bytes because numpy has no bf16.
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data
