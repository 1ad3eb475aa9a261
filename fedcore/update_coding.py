"""Which tensors an update travels as where the plan asks for fewer bytes. No torch: the control processes check specs.

Kernels and matrices (two dimensions or more) travel as the coded difference to the global model, or to zero for what a
strategy sends beside it (`aux/...`). Vectors and integers (biases, normalisation, its statistics) are few bytes and
travel as they are. The site's half is `fedagent.encoding`, the coordinator's `fedserver.decoding`.

| coding | a tensor NAME travels as |
|---|---|
| bf16 | `NAME` BF16, its shape |
| int8 | `NAME` I8, its shape, and `scale/NAME` F32 [first dimension]: a step a channel |
| top_k | `NAME` F32 [k], the differences of largest size, and `index/NAME` I32 [k], where in the flat tensor, ascending |
"""

import math
from collections.abc import Iterable

from fedcore.plan import TransferSection
from fedcore.tensor_file import TensorSpec

SCALE_PREFIX = "scale/"
INDEX_PREFIX = "index/"
# Places in a tensor travel as I32.
_MAX_INDEXED = 2**31 - 1


def is_coded(spec: TensorSpec, transfer: TransferSection) -> bool:
    """Whether a tensor travels coded under this plan."""
    fits = transfer.updates != "top_k" or math.prod(spec.shape) <= _MAX_INDEXED
    return (
        transfer.updates != "lossless"
        and len(spec.shape) >= 2
        and spec.dtype in ("F32", "F64")
        and fits
        and spec.size_bytes > 0
    )


def kept_count(spec: TensorSpec, transfer: TransferSection) -> int:
    """How many numbers of a tensor top-k sends, at least one."""
    return max(1, math.ceil(transfer.top_k_share * math.prod(spec.shape)))


def coded_specs(specs: Iterable[TensorSpec], transfer: TransferSection) -> list[TensorSpec]:
    """The tensors that an update of `specs` travels as."""
    coded: list[TensorSpec] = []
    for spec in specs:
        coded += _coded(spec, transfer) if is_coded(spec, transfer) else [spec]
    return coded


def _coded(spec: TensorSpec, transfer: TransferSection) -> list[TensorSpec]:
    match transfer.updates:
        case "int8":
            scale = TensorSpec(SCALE_PREFIX + spec.name, "F32", spec.shape[:1])
            return [TensorSpec(spec.name, "I8", spec.shape), scale]
        case "top_k":
            count = (kept_count(spec, transfer),)
            return [TensorSpec(spec.name, "F32", count), TensorSpec(INDEX_PREFIX + spec.name, "I32", count)]
        case _:
            return [TensorSpec(spec.name, "BF16", spec.shape)]
