"""Merge sites' updates into a global model: pure functions from tensor files to a tensor file.

Updates are read block by block, so memory grows neither with the number of sites nor with the model; and always in the
order given, so arrival order never changes a bit.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from fedcore.errors import EmptyRoundError, LearningError, StorageError, TensorMismatchError
from fedcore.models.state_file import TORCH_DTYPES
from fedcore.norm_statistics import variance_partner
from fedcore.plan import TransferSection
from fedcore.tensor_file import TensorManifest, check_expected
from fedcore.update_verdict import MergeFigures
from fedserver.block_mergers import BlockMerger, NotFiniteError, Summands, SumMerger
from fedserver.decoding import open_update
from fedserver.merge_rules import named_shares, set_up_rule
from fedserver.robust.shortened import Shortened
from fedserver.strategies.base import MergeRequest, MergeResult, SiteReport, SiteUpdate
from fedserver.tensor_blocks import BLOCK, blocks, first_not_finite
from fedserver.tensor_source import TensorFile, TensorSource

Weigh = Callable[[Sequence[SiteReport]], Sequence[float]]


def merge_updates(request: MergeRequest, weigh: Weigh, *, extras_out: Path | None = None) -> MergeResult:
    """Merge the updates of one round into a new global model at `request.out`, by the rule `request.rule`.

    By default that is their weighted mean: floating tensors accumulate in float64 and return to their own dtype; integer
    buffers (BatchNorm's `num_batches_tracked`) take the maximum; a BatchNorm variance is the variance of the sites'
    pooled statistics: the weighted mean of their variances plus the spread of their means (law of total variance). The
    other rules are in `fedserver.robust`. Tensors that stay at the sites are taken over from `request.model`. What
    updates carry beside the model (`request.extras`) is checked like the rest and merged into `extras_out`, or left
    aside without it.

    An update with missing, surplus or misshapen tensors, NaN, Inf, a negative variance or no training images
    is left out, with the reason in `rejected`. Raises EmptyRoundError if none is left, LearningError if sound
    updates merge to a number that the dtype can't hold.
    Source: McMahan et al. 2017, Algorithm 1.
    """
    model = TensorFile.open(request.model)
    local = set(request.local_tensors)
    extras = TensorManifest.of(request.extras)
    expected = expected_update(request, model)
    rejected: dict[str, str] = {}
    accepted: list[tuple[SiteUpdate, TensorSource]] = []
    for update in request.updates:
        try:
            accepted.append((update, open_checked(update, expected, model, request)))
        except (TensorMismatchError, StorageError, LearningError) as error:
            rejected[update.site] = error.message
    while True:
        if not accepted:
            reasons = "; ".join(rejected.values()) or "no site delivered one"
            raise EmptyRoundError(f"round {request.round}: no usable update: {reasons}")
        weighed = weigh([update.report for update, _ in accepted])
        shares = [w * update.share for w, (update, _) in zip(weighed, accepted, strict=True)]
        weights = normalised(shares, request.round)
        files = [file for _, file in accepted]
        try:
            rule = set_up_rule(request.rule, model, files, weights, request.parameters)
            digest = _write_merged(model.manifest, rule.merger, request.out, keep=(model, local))
            if extras_out is not None:
                _write_merged(extras, rule.merger, extras_out)
        except NotFiniteError as problem:
            found = _not_finite(accepted, request.round)
            if not found:
                raise LearningError(
                    f"round {request.round}: tensor '{problem.name}' overflows its dtype when merged"
                ) from problem
            rejected |= found
            accepted = [(update, file) for update, file in accepted if update.site not in found]
        else:
            sites = tuple(update.site for update, _ in accepted)
            figures = MergeFigures(
                rule=request.rule.rule, tolerated=rule.tolerated, weights=dict(named_shares(sites, rule))
            )
            return MergeResult(digest, sites, rejected, figures=figures)


def expected_update(request: MergeRequest, model: TensorFile) -> TensorManifest:
    """What an update of this round must hold: the model's tensors less those that stay at the sites, and the extras."""
    local = set(request.local_tensors)
    return TensorManifest.of(
        [*(spec for spec in model.manifest.tensors if spec.name not in local), *request.extras]
    )


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


def open_checked(
    update: SiteUpdate, expected: TensorManifest, model: TensorFile, request: MergeRequest
) -> TensorSource:
    """Open an update, shortened if the gate said so, after the checks that cost nothing: header, report, variances.

    Raises TensorMismatchError, StorageError, LearningError.
    """
    who = f"{update.site} round {request.round}"
    if update.report.num_examples <= 0:
        raise LearningError(f"{who}: trained on {update.report.num_examples} images; update discarded")
    transfer = TransferSection() if update.whole else request.transfer
    file = open_update(update.path, expected, model, transfer, who)
    for spec in file.manifest.tensors:
        if variance_partner(spec.name) and bool((file.whole(spec) < 0).any()):
            raise LearningError(f"{who}: tensor '{spec.name}' holds a negative variance; update discarded")
    return Shortened(file, model, update.kept, request.parameters) if update.kept else file


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
    merger = SumMerger(lambda name: Summands([before, new], [keep, 1 - keep]))
    return _write_merged(new.manifest, merger, out, keep=(new, set(local_tensors)), pool_variances=False)


def _write_merged(
    manifest: TensorManifest,
    merger: BlockMerger,
    out: Path,
    *,
    keep: tuple[TensorSource, set[str]] | None = None,
    pool_variances: bool = True,
) -> str:
    """Merge the tensors that `manifest` names into the file `out` and return its digest.

    The tensors named in `keep` are copied from its file instead. Raises NotFiniteError.
    """
    digest = hashlib.sha256()
    specs = {spec.name: spec for spec in manifest.tensors}
    kept, local = keep if keep is not None else (None, set[str]())
    with out.open("wb", buffering=0) as file:
        _put(file, digest, manifest.header())
        for spec in manifest.tensors:
            mean = specs.get(variance_partner(spec.name) or "") if pool_variances else None
            if kept is not None and spec.name in local:
                buffer = bytearray(BLOCK * 8)
                merged: Iterator[Tensor] = (kept.read(spec, at, count, buffer) for at, count in blocks(spec))
            elif not TORCH_DTYPES[spec.dtype].is_floating_point:
                merged = merger.integers(spec)
            elif mean is not None and mean.shape == spec.shape and mean.name not in local:
                merged = merger.variance(spec, mean)
            else:
                merged = merger.floats(spec)
            for block in merged:
                _put(file, digest, block.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _put(file: IO[bytes], digest: "hashlib._Hash", data: bytes | memoryview) -> None:
    digest.update(data)
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
