"""Merge sites' updates into a global model: pure functions from tensor files to a tensor file.

Updates are read block by block, a block of every site in turn, so memory grows neither with the number of
sites nor with the model; and always in the order given, so arrival order never changes a bit.

Legend: a block is a stretch of at most BLOCK elements of one tensor.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from fedcore.errors import EmptyRoundError, LearningError, StorageError, TensorMismatchError
from fedcore.models.state_file import TORCH_DTYPES
from fedcore.tensor_file import EXTRA_PREFIX, TensorManifest, TensorSpec, check_expected
from fedserver.decoding import open_update
from fedserver.strategies.base import MergeRequest, MergeResult, SiteReport, SiteUpdate
from fedserver.tensor_source import TensorFile, TensorSource

# Elements in a block: float64 sum and float32 input stay within a core's cache.
BLOCK = 1 << 16

Weigh = Callable[[Sequence[SiteReport]], Sequence[float]]


class _NotFiniteError(Exception):
    """The merged tensor `name` holds NaN or Inf: some site's update does, and has to be found."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def merge_by_weighted_mean(
    request: MergeRequest, weigh: Weigh, *, extras_out: Path | None = None
) -> MergeResult:
    """Average the updates of one round into a new global model at `request.out`.

    Floating tensors accumulate in float64 and return to their own dtype; integer buffers (BatchNorm's
    `num_batches_tracked`) take the maximum; a BatchNorm variance is the variance of the sites' pooled
    statistics: the weighted mean of their variances plus the spread of their means (law of total variance).
    Tensors that stay at the sites are taken over from `request.model`. What updates carry beside the model
    (`request.extras`) is checked like the rest and averaged into `extras_out`, or left aside without it.

    An update with missing, surplus or misshapen tensors, NaN, Inf, a negative variance or no training images
    is left out, with the reason in `rejected`. Raises EmptyRoundError if none is left, LearningError if sound
    updates merge to a number that the dtype can't hold.
    Source: McMahan et al. 2017, Algorithm 1.
    """
    model = TensorFile.open(request.model)
    local = set(request.local_tensors)
    extras = TensorManifest.of(request.extras)
    expected = TensorManifest.of(
        [*(spec for spec in model.manifest.tensors if spec.name not in local), *extras.tensors]
    )
    rejected: dict[str, str] = {}
    accepted: list[tuple[SiteUpdate, TensorSource]] = []
    for update in request.updates:
        try:
            accepted.append((update, _open_checked(update, expected, model, request)))
        except (TensorMismatchError, StorageError, LearningError) as error:
            rejected[update.site] = error.message
    while True:
        if not accepted:
            reasons = "; ".join(rejected.values()) or "no site delivered one"
            raise EmptyRoundError(f"round {request.round}: no usable update: {reasons}")
        weights = normalised(weigh([update.report for update, _ in accepted]), request.round)
        files = [file for _, file in accepted]
        try:
            digest = _write_mean(model.manifest, files, weights, request.out, keep=(model, local))
            if extras_out is not None:
                _write_mean(extras, files, weights, extras_out)
        except _NotFiniteError as problem:
            found = _not_finite(accepted, request.round)
            if not found:
                raise LearningError(
                    f"round {request.round}: tensor '{problem.name}' overflows its dtype when merged"
                ) from problem
            rejected |= found
            accepted = [(update, file) for update, file in accepted if update.site not in found]
        else:
            return MergeResult(digest, tuple(update.site for update, _ in accepted), rejected)


def _not_finite(accepted: Sequence[tuple[SiteUpdate, TensorSource]], round_number: int) -> dict[str, str]:
    """The sites whose updates hold NaN or Inf, with the reason."""
    return {
        update.site: f"{update.site} round {round_number}: tensor '{name}' holds NaN or Inf; discarded"
        for update, file in accepted
        if (name := first_not_finite(file))
    }


def normalised(weights: Sequence[float], round_number: int = 0) -> list[float]:
    """Weights that sum to one. Raises LearningError if one is negative or not finite, or all are zero."""
    total = math.fsum(weights)
    if any(not math.isfinite(w) or w < 0 for w in weights) or not total > 0:
        raise LearningError(f"round {round_number}: site weights {list(weights)} are not positive numbers")
    return [w / total for w in weights]


def weighted_mean(
    blocks: Iterable[Tensor], weights: Sequence[float], total: Tensor, scratch: Tensor
) -> Tensor:
    """Sum of `weights[i] * blocks[i]`, into `total`; both float64 buffers have the blocks' shape."""
    total.zero_()
    for block, weight in zip(blocks, weights, strict=True):
        total.add_(scratch.copy_(block), alpha=weight)
    return total


def pooled_variance(sites: Callable[[], Iterator[tuple[Tensor, Tensor]]], weights: Sequence[float]) -> Tensor:
    """Variance [C] of the mixture of sites: the mean of their variances plus the spread of their means.

    `sites()` yields each site's mean [C] and variance [C], in the order of `weights`; it is called twice.
    """
    mean_C = sum(
        (w * site_C.double() for w, (site_C, _) in zip(weights, sites(), strict=True)),
        start=torch.zeros((), dtype=torch.float64),
    )
    return sum(
        (
            w * (variance_C.double() + (site_C.double() - mean_C).square())
            for w, (site_C, variance_C) in zip(weights, sites(), strict=True)
        ),
        start=torch.zeros((), dtype=torch.float64),
    )


def variance_partner(name: str) -> str | None:
    """The tensor that holds the mean to which the running variance `name` belongs; None for other tensors."""
    prefix, _, last = name.rpartition(".")
    if last != "running_var" or name.startswith(EXTRA_PREFIX):
        return None
    return f"{prefix}.running_mean" if prefix else "running_mean"


def first_not_finite(file: TensorSource) -> str | None:
    """Name of the first floating tensor that holds NaN or Inf."""
    buffer = bytearray(BLOCK * 8)
    for spec in file.manifest.tensors:
        if not TORCH_DTYPES[spec.dtype].is_floating_point:
            continue
        for first, count in _blocks(spec):
            if not torch.isfinite(file.read(spec, first, count, buffer)).all():
                return spec.name
    return None


def _open_checked(
    update: SiteUpdate, expected: TensorManifest, model: TensorFile, request: MergeRequest
) -> TensorSource:
    """What of the gate costs nothing:

    header, report, variances. NaN and Inf show when the sum is not finite.
    """
    who = f"{update.site} round {request.round}"
    if update.report.num_examples <= 0:
        raise LearningError(f"{who}: trained on {update.report.num_examples} images; update discarded")
    file = open_update(update.path, expected, model, request.transfer, who)
    for spec in file.manifest.tensors:
        if variance_partner(spec.name) and bool((file.whole(spec) < 0).any()):
            raise LearningError(f"{who}: tensor '{spec.name}' holds a negative variance; update discarded")
    return file


def average_over_rounds(
    previous: Path, model: Path, keep: float, local_tensors: Collection[str], out: Path
) -> str:
    """Write `keep` times the average before plus `1 - keep` times the new model; returns the digest.

    Integer buffers take the maximum. BatchNorm statistics are averaged like weights: both models saw the same
    images, so the difference of their means is no spread within the data. Tensors that stay at the sites are
    taken over from `model`. Raises StorageError if a file is damaged, TensorMismatchError if the models differ.
    """
    before, new = TensorFile.open(previous), TensorFile.open(model)
    check_expected(before.manifest, new.manifest, "average over rounds")
    files, shares = [before, new], [keep, 1 - keep]
    return _write_mean(new.manifest, files, shares, out, keep=(new, set(local_tensors)), pool_variances=False)


def _write_mean(
    manifest: TensorManifest,
    updates: Sequence[TensorSource],
    weights: Sequence[float],
    out: Path,
    *,
    keep: tuple[TensorSource, set[str]] | None = None,
    pool_variances: bool = True,
) -> str:
    """Write the mean of the updates' tensors that `manifest` names and return its digest.

    The tensors named in `keep` are copied from its file instead. Raises _NotFiniteError.
    """
    digest = hashlib.sha256()
    specs = {spec.name: spec for spec in manifest.tensors}
    kept, local = keep if keep is not None else (None, set[str]())
    merger = _BlockMerger(weights)
    with out.open("wb", buffering=0) as file:
        _put(file, digest, manifest.header())
        for spec in manifest.tensors:
            mean = specs.get(variance_partner(spec.name) or "") if pool_variances else None
            if kept is not None and spec.name in local:
                blocks = merger.copy(kept, spec)
            elif not TORCH_DTYPES[spec.dtype].is_floating_point:
                blocks = merger.maximum(updates, spec)
            elif mean is not None and mean.shape == spec.shape and mean.name not in local:
                blocks = merger.variance(updates, spec, mean)
            else:
                blocks = merger.mean(updates, spec)
            for block in blocks:
                _put(file, digest, block.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _put(file: IO[bytes], digest: "hashlib._Hash", data: bytes | memoryview) -> None:
    digest.update(data)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _blocks(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """First element and number of elements of each block of a tensor."""
    elements = math.prod(spec.shape)
    for first in range(0, elements, BLOCK):
        yield first, min(BLOCK, elements - first)


class _BlockMerger:
    """The merged blocks of one tensor after another, in buffers that are used again and again."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = weights
        self._buffer = bytearray(BLOCK * 8)
        self._total = torch.empty(BLOCK, dtype=torch.float64)
        self._scratch = torch.empty(BLOCK, dtype=torch.float64)

    def copy(self, model: TensorSource, spec: TensorSpec) -> Iterator[Tensor]:
        for first, count in _blocks(spec):
            yield model.read(spec, first, count, self._buffer)

    def maximum(self, updates: Sequence[TensorSource], spec: TensorSpec) -> Iterator[Tensor]:
        for first, count in _blocks(spec):
            highest = updates[0].read(spec, first, count, self._buffer).clone()
            for update in updates[1:]:
                torch.maximum(highest, update.read(spec, first, count, self._buffer), out=highest)
            yield highest

    def mean(self, updates: Sequence[TensorSource], spec: TensorSpec) -> Iterator[Tensor]:
        for first, count in _blocks(spec):
            blocks = (update.read(spec, first, count, self._buffer) for update in updates)
            total = weighted_mean(blocks, self._weights, self._total[:count], self._scratch[:count])
            yield self._narrowed(total, spec)

    def variance(
        self, updates: Sequence[TensorSource], spec: TensorSpec, mean: TensorSpec
    ) -> Iterator[Tensor]:
        def sites() -> Iterator[tuple[Tensor, Tensor]]:
            return ((update.whole(mean), update.whole(spec)) for update in updates)

        yield self._narrowed(pooled_variance(sites, self._weights), spec)

    def _narrowed(self, total: Tensor, spec: TensorSpec) -> Tensor:
        narrow = total.to(TORCH_DTYPES[spec.dtype])
        # A sum is finite if and only if every summand is: one pass checks all sites.
        if not math.isfinite(float(narrow.sum(dtype=torch.float64))):
            raise _NotFiniteError(spec.name)
        return narrow
