"""Tensors a block at a time, so that memory does not grow with their number or size.

Legend: a block is a stretch of at most BLOCK elements of one tensor.
"""

import math
from collections.abc import Iterator

import torch

from fedcore.models.state_file import TORCH_DTYPES
from fedcore.tensor_file import TensorSpec
from fedserver.tensor_source import TensorSource

# Elements in a block: float64 sum and float32 input stay within a core's cache.
BLOCK = 1 << 16


def blocks(spec: TensorSpec, size: int | None = None) -> Iterator[tuple[int, int]]:
    """First element and number of elements of each block of a tensor; `size` elements instead of BLOCK."""
    elements = math.prod(spec.shape)
    step = size or BLOCK
    for first in range(0, elements, step):
        yield first, min(step, elements - first)


def first_not_finite(file: TensorSource) -> str | None:
    """Name of the first floating tensor that holds NaN or Inf."""
    buffer = bytearray(BLOCK * 8)
    for spec in file.manifest.tensors:
        if not TORCH_DTYPES[spec.dtype].is_floating_point:
            continue
        for first, count in blocks(spec):
            if not torch.isfinite(file.read(spec, first, count, buffer)).all():
                return spec.name
    return None
