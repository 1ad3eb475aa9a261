# ruff: noqa: N803, N806 - shape suffixes
"""The coordinator's half of fewer bytes: a coded update (`fedcore.update_coding`), read as if it were the whole.

Nothing is expanded on the disk: a block of a coded tensor is the global model's block plus the decoded difference, so
every way of merging works on coded updates, in the memory that it needs for others.

Legend: a block is a stretch of a flat tensor. C is a tensor's first dimension.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from fedcore.errors import LearningError, StorageError
from fedcore.models.state_file import TORCH_DTYPES
from fedcore.plan import TransferSection
from fedcore.tensor_file import DTYPE_BYTES, TensorManifest, TensorSpec, check_expected
from fedcore.update_coding import INDEX_PREFIX, SCALE_PREFIX, coded_specs, is_coded
from fedserver.tensor_source import TensorFile, TensorSource


def open_update(
    path: Path, expected: TensorManifest, model: TensorFile, transfer: TransferSection, who: str
) -> TensorSource:
    """Open a site's update, which must decode to the tensors of `expected`; `who` opens messages.

    Raises StorageError, TensorMismatchError, LearningError for places that can't be.
    """
    file = TensorFile.open(path)
    if transfer.updates == "lossless":
        check_expected(file.manifest, expected, who)
        return file
    check_expected(file.manifest, TensorManifest.of(coded_specs(expected.tensors, transfer)), who)
    return CodedUpdate(file, expected, model, transfer, who)


def read_update(path: Path, model: Path, transfer: TransferSection) -> dict[str, Tensor]:
    """The model's tensors as an update has them, decoded, each with its own memory; what it carries beside is left out.

    `model` is what the site started from. Raises StorageError if one is missing or of another kind.
    """
    start, file = TensorFile.open(model), TensorFile.open(path)
    local = {spec.name for spec in start.manifest.tensors} - {spec.name for spec in file.manifest.tensors}
    expected = TensorManifest.of(spec for spec in start.manifest.tensors if spec.name not in local)
    beside = set(coded_specs(expected.tensors, transfer)) - set(file.manifest.tensors)
    if beside:
        raise StorageError(
            f"{path.name}: does not hold tensor '{min(spec.name for spec in beside)}' of the model"
        )
    source: TensorSource = file
    if transfer.updates != "lossless":
        source = CodedUpdate(file, expected, start, transfer, path.name)
    return {spec.name: source.whole(spec).reshape(spec.shape) for spec in expected.tensors}


class CodedUpdate:
    """A coded update: `read` and `whole` give what the site's tensors decode to."""

    def __init__(
        self,
        file: TensorFile,
        manifest: TensorManifest,
        model: TensorFile,
        transfer: TransferSection,
        who: str,
    ) -> None:
        self.path = file.path
        self.manifest = manifest
        self._file = file
        self._model = model
        self._transfer = transfer
        self._coded = {spec.name: spec for spec in file.manifest.tensors}
        self._in_model = {spec.name: spec for spec in model.manifest.tensors}
        # Of the tensor that is being read: its steps, or its places and values.
        self._open: tuple[str, tuple[Tensor, ...]] = ("", ())
        if transfer.updates == "top_k":
            self._check_places(who)

    def read(self, spec: TensorSpec, first: int, count: int, buffer: bytearray) -> Tensor:
        """Elements `first` to `first + count` of a tensor, flat, in `buffer` (valid until its next use)."""
        if not is_coded(spec, self._transfer):
            return self._file.read(self._coded[spec.name], first, count, buffer)
        block = self._start(spec, first, count, buffer)
        coded = self._coded[spec.name]
        match self._transfer.updates:
            case "top_k":
                places, values = self._parts(spec, INDEX_PREFIX + spec.name, spec.name)
                low, high = torch.searchsorted(
                    places, torch.tensor([first, first + count], dtype=places.dtype)
                )
                block.index_add_(0, places[low:high].long() - first, values[low:high].to(block.dtype))
            case "int8":
                (step_C,) = self._parts(spec, SCALE_PREFIX + spec.name)
                block += self._delta(coded, first, count) * self._steps(spec, step_C, first, count)
            case _:
                block += self._delta(coded, first, count)
        return block

    def whole(self, spec: TensorSpec) -> Tensor:
        """A whole tensor, flat, with its own memory."""
        return self.read(spec, 0, math.prod(spec.shape), bytearray(spec.size_bytes))

    def _start(self, spec: TensorSpec, first: int, count: int, buffer: bytearray) -> Tensor:
        """The global model's block, zeros for what is not of the model."""
        if spec.name in self._in_model:
            return self._model.read(self._in_model[spec.name], first, count, buffer)
        buffer[: count * DTYPE_BYTES[spec.dtype]] = bytes(count * DTYPE_BYTES[spec.dtype])
        return torch.frombuffer(buffer, dtype=TORCH_DTYPES[spec.dtype], count=count)

    def _delta(self, coded: TensorSpec, first: int, count: int) -> Tensor:
        return self._file.read(coded, first, count, bytearray(count * DTYPE_BYTES[coded.dtype])).float()

    def _parts(self, spec: TensorSpec, *names: str) -> tuple[Tensor, ...]:
        if self._open[0] != spec.name:
            self._open = (spec.name, tuple(self._file.whole(self._coded[name]) for name in names))
        return self._open[1]

    @staticmethod
    def _steps(spec: TensorSpec, step_C: Tensor, first: int, count: int) -> Tensor:
        """The step of each element of a block."""
        per_channel = math.prod(spec.shape[1:])
        low, high = first // per_channel, (first + count - 1) // per_channel + 1
        steps = step_C[low:high].repeat_interleave(per_channel)
        return steps[first - low * per_channel :][:count]

    def _check_places(self, who: str) -> None:
        for spec in self.manifest.tensors:
            if is_coded(spec, self._transfer):
                places = self._file.whole(self._coded[INDEX_PREFIX + spec.name])
                last = math.prod(spec.shape) - 1
                if int(places[0]) < 0 or int(places[-1]) > last or bool((places.diff() <= 0).any()):
                    raise LearningError(
                        f"{who}: tensor '{INDEX_PREFIX}{spec.name}' does not name ascending places"
                        f" from 0 to {last}; update discarded"
                    )
