"""A step of the server's own after the mean: momentum, adaptive optimisers, control variates.

The sites' mean (or what the plan's `[aggregation]` has in its place) is written first; then each trained tensor is moved
by a rule that sees where the round began, the mean, and what the strategy keeps for this tensor. One tensor is in memory
at a time, so memory grows neither with the number of sites nor with the depth of the model.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fedcore.digest import file_digest
from fedcore.errors import LearningError
from fedcore.models.state_file import TORCH_DTYPES
from fedcore.tensor_file import EXTRA_PREFIX, TensorManifest, TensorSpec
from fedserver.aggregation import Weigh, merge_updates
from fedserver.strategies.base import MergeRequest, MergeResult
from fedserver.tensor_source import TensorFile


@dataclass(frozen=True, slots=True)
class ServerTensor:
    """One trained tensor at the end of a round. All tensors are float64 and flat, [E]."""

    name: str
    # Where the sites started from, and the weighted mean of where they ended.
    start: Tensor
    mean: Tensor
    # What the strategy kept for this tensor, by slot; empty in the first round.
    slots: Mapping[str, Tensor]
    # Weighted means of what the sites sent beside it, by kind: `aux/KIND/NAME` of the updates.
    extras: Mapping[str, Tensor]
    # Share of the run's sites that are in the mean.
    participation: float


# From a tensor to its new value and the slots that are kept for the next round.
Rule = Callable[[ServerTensor], tuple[Tensor, Mapping[str, Tensor]]]


def merge_with_step(request: MergeRequest, weigh: Weigh, rule: Rule, slots: Sequence[str]) -> MergeResult:
    """Merge the updates, then move every trained tensor by `rule`; buffers stay as they were merged.

    `slots` name what the rule keeps a tensor: the strategy's state is the file of tensors `SLOT/NAME`, of each
    tensor's own shape and dtype. Raises what `merge_updates` raises, and LearningError if a step leaves
    what the dtype can hold.
    """
    with _beside(request.out, "mean") as mean_path, _beside(request.out, "extras") as extras_path:
        merged = merge_updates(replace(request, out=mean_path), weigh, extras_out=extras_path)
        step = _Step(request, mean_path, extras_path, len(merged.accepted))
        digest, state_digest = step.write(rule, slots)
    return replace(merged, digest=digest, state_digest=state_digest)


class _Step:
    """The files of one step, opened."""

    def __init__(self, request: MergeRequest, mean: Path, extras: Path, accepted: int) -> None:
        self._request = request
        self._model = TensorFile.open(request.model)
        self._mean = TensorFile.open(mean)
        self._extras = TensorFile.open(extras)
        self._state = TensorFile.open(request.state) if request.state is not None else None
        self._participation = accepted / max(request.num_sites, accepted)

    def write(self, rule: Rule, slots: Sequence[str]) -> tuple[str, str | None]:
        """Write model and state; returns their digests, None for a state without slots."""
        trained = set(self._request.parameters) - set(self._request.local_tensors)
        manifest = self._model.manifest
        kept = TensorManifest.of(
            TensorSpec(f"{slot}/{spec.name}", spec.dtype, spec.shape)
            for slot in slots
            for spec in manifest.tensors
            if spec.name in trained
        )
        with _open(self._request.out, manifest) as model, _open_state(self._request, kept) as state:
            for spec in manifest.tensors:
                if spec.name not in trained:
                    model.put(spec.name, self._mean.whole(spec))
                    continue
                moved, remembered = rule(self._tensor(spec, slots))
                model.put(spec.name, self._narrowed(moved, spec))
                for slot in slots:
                    assert state is not None
                    state.put(f"{slot}/{spec.name}", self._narrowed(remembered[slot], spec))
            return model.digest(), state.digest() if state is not None else None

    def _tensor(self, spec: TensorSpec, slots: Sequence[str]) -> ServerTensor:
        kinds = {
            extra.name.removeprefix(EXTRA_PREFIX).removesuffix(f"/{spec.name}"): extra
            for extra in self._extras.manifest.tensors
            if extra.name.endswith(f"/{spec.name}") and extra.name.count("/") == 2
        }
        state = self._state
        return ServerTensor(
            name=spec.name,
            start=self._model.whole(spec).double(),
            mean=self._mean.whole(spec).double(),
            slots={}
            if state is None
            else {slot: state.named(f"{slot}/{spec.name}").double() for slot in slots},
            extras={kind: self._extras.whole(extra).double() for kind, extra in kinds.items()},
            participation=self._participation,
        )

    def _narrowed(self, tensor: Tensor, spec: TensorSpec) -> Tensor:
        narrow = tensor.to(TORCH_DTYPES[spec.dtype])
        if not bool(torch.isfinite(narrow).all()):
            raise LearningError(
                f"round {self._request.round}: the server's step on tensor '{spec.name}' gives NaN or Inf",
                hint="lower strategy_options.server_learning_rate",
            )
        return narrow


class _TensorsOut:
    """A canonical file that takes its tensors in any order."""

    def __init__(self, path: Path, manifest: TensorManifest, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        header = manifest.header()
        self._starts = {name: len(header) + start for name, (start, _) in manifest.offsets().items()}
        self._write(header, 0)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor's bytes at their place."""
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""
        self._write(data, self._starts[name])

    def digest(self) -> str:
        """The file's SHA-256, once it is whole."""
        return file_digest(self._path)

    def _write(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written


@contextmanager
def _open(path: Path, manifest: TensorManifest) -> Iterator[_TensorsOut]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        yield _TensorsOut(path, manifest, descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _open_state(request: MergeRequest, manifest: TensorManifest) -> Iterator[_TensorsOut | None]:
    if not manifest.tensors:
        yield None
        return
    assert request.state_out is not None, "a strategy that keeps state needs a place for it"
    with _open(request.state_out, manifest) as out:
        yield out


@contextmanager
def _beside(path: Path, what: str) -> Iterator[Path]:
    """A path for an intermediate file, which is gone in the end."""
    beside = path.with_name(f"{path.name}.{what}")
    try:
        yield beside
    finally:
        beside.unlink(missing_ok=True)
