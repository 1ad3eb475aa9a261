"""Lengths of updates and distances between them, a block of each file at a time.

Kinds of tensors are measured apart, since their scales have nothing to do with each other: "parameters", the buffers'
"statistics" (BatchNorm), and each kind that a strategy adds, "aux/KIND". Integers have no length.

Legend: S sites, E elements of a block.
"""

import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from fedcore.models.state_file import TORCH_DTYPES
from fedcore.tensor_file import EXTRA_PREFIX, TensorSpec
from fedserver.tensor_blocks import BLOCK, blocks
from fedserver.tensor_source import TensorSource

PARAMETERS, STATISTICS = "parameters", "statistics"
# Elements of all sites' blocks together, where they are in memory side by side.
_SIDE_BY_SIDE = 1 << 20


def kind_of(name: str, parameters: Collection[str]) -> str:
    """Which kind a floating tensor is of. Without any name in `parameters`, every tensor of the model is one."""
    if name.startswith(EXTRA_PREFIX):
        return "/".join(name.split("/", 2)[:2])
    return PARAMETERS if not parameters or name in parameters else STATISTICS


def update_norms(model: TensorSource, update: TensorSource, parameters: Collection[str]) -> dict[str, float]:
    """The Euclidean length, by kind, of the update's difference to `model`; of what the model lacks, its own length.

    Infinite or NaN if the update holds such numbers, or its length does not fit float32.
    """
    ours, theirs = bytearray(BLOCK * 8), bytearray(BLOCK * 8)
    squares: dict[str, float] = {}
    known = {spec.name for spec in model.manifest.tensors}
    for spec in update.manifest.tensors:
        if not TORCH_DTYPES[spec.dtype].is_floating_point:
            continue
        kind = kind_of(spec.name, parameters)
        for first, count in blocks(spec):
            change = update.read(spec, first, count, theirs)
            if spec.name in known:
                change = change - model.read(spec, first, count, ours)
            square = float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
            squares[kind] = squares.get(kind, 0.0) + square
    return {kind: math.sqrt(square) for kind, square in squares.items()}


def side_by_side(
    files: Sequence[TensorSource], spec: TensorSpec, dtype: torch.dtype | None = None
) -> Iterator[Tensor]:
    """Blocks [S, E] of one tensor of all files, in memory of `dtype` (its own); all sites' blocks share a fixed size."""
    size = max(1, min(BLOCK, _SIDE_BY_SIDE // len(files)))
    buffer = bytearray(size * 8)
    values_SE = torch.empty((len(files), size), dtype=dtype or TORCH_DTYPES[spec.dtype])
    for first, count in blocks(spec, size):
        for row, file in enumerate(files):
            values_SE[row, :count] = file.read(spec, first, count, buffer)
        yield values_SE[:, :count]


def squared_distances(files: Sequence[TensorSource], parameters: Collection[str]) -> Tensor:
    """Squared Euclidean distances [S, S] between the updates' parameters, float64.

    Blocks are taken relative to the first site's: models lie near each other, and far from zero.
    """
    gram_SS = torch.zeros((len(files), len(files)), dtype=torch.float64)
    for spec in files[0].manifest.tensors:
        floating = TORCH_DTYPES[spec.dtype].is_floating_point
        if not floating or kind_of(spec.name, parameters) != PARAMETERS:
            continue
        for values_SE in side_by_side(files, spec, torch.float64):
            relative_SE = values_SE - values_SE[:1]
            gram_SS += relative_SE @ relative_SE.T
    lengths_S = gram_SS.diagonal()
    distances_SS = (lengths_S[:, None] + lengths_S[None, :] - 2 * gram_SS).clamp_min(0.0)
    return distances_SS.fill_diagonal_(0.0)
