"""Named tensors that are read a stretch at a time: a canonical tensor file, or what reads like one."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from fedcore.errors import StorageError
from fedcore.models.state_file import TORCH_DTYPES
from fedcore.tensor_file import DTYPE_BYTES, TensorManifest, TensorSpec, read_manifest


class TensorSource(Protocol):
    """Tensors that are read in stretches; nothing of them is kept in memory."""

    @property
    def manifest(self) -> TensorManifest:
        """What is there."""

    def read(self, spec: TensorSpec, first: int, count: int, buffer: bytearray) -> Tensor:
        """Elements `first` to `first + count` of a tensor, flat, in `buffer` (valid until its next use).

        Raises StorageError if a file has shrunk meanwhile.
        """

    def whole(self, spec: TensorSpec) -> Tensor:
        """A whole tensor, flat, with its own memory; for small ones."""


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A canonical tensor file that is read a stretch at a time. Holds no descriptor and no map."""

    path: Path
    manifest: TensorManifest
    starts: dict[str, int]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read the header. Raises StorageError."""
        manifest, payload = read_manifest(path)
        return cls(path, manifest, {name: payload + start for name, (start, _) in manifest.offsets().items()})

    def read(self, spec: TensorSpec, first: int, count: int, buffer: bytearray) -> Tensor:
        """Elements `first` to `first + count` of a tensor, flat, in `buffer` (valid until its next use).

        Raises StorageError if the file has shrunk meanwhile.
        """
        itemsize = DTYPE_BYTES[spec.dtype]
        view = memoryview(buffer)[: count * itemsize]
        descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            got = os.preadv(descriptor, [view], self.starts[spec.name] + first * itemsize)
        finally:
            os.close(descriptor)
        if got != view.nbytes:
            raise StorageError(f"{self.path}: tensor '{spec.name}' ends early")
        return torch.frombuffer(buffer, dtype=TORCH_DTYPES[spec.dtype], count=count)

    def whole(self, spec: TensorSpec) -> Tensor:
        """A whole tensor, flat, with its own memory; for small ones."""
        return self.read(spec, 0, math.prod(spec.shape), bytearray(spec.size_bytes))

    def named(self, name: str) -> Tensor:
        """A whole tensor by its name. Raises StorageError if the file has none of it."""
        spec = next((spec for spec in self.manifest.tensors if spec.name == name), None)
        if spec is None:
            raise StorageError(f"{self.path}: tensor '{name}' is missing")
        return self.whole(spec)
