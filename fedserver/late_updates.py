"""Late updates on the way into an aggregation: as if they had started from the model of this round.

A site that started from an earlier model x' and came to y did the step y - x'; the round's model x makes that step:
x + (y - x'). BatchNorm statistics, counters and what a strategy adds are measurements and differences already, and are
taken as they are.

The weight of a late update falls with its age: Xie et al. 2019, "Asynchronous Federated Optimization", arXiv:1903.03934,
section 5.2, which mixes late models; here, as in buffered aggregation (Nguyen et al. 2022, FedBuff, arXiv:2106.06639),
their differences.
"""

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from fedcore.models.state_file import TORCH_DTYPES
from fedserver.robust.norms import PARAMETERS, kind_of
from fedserver.strategies.base import SiteReport
from fedserver.tensor_blocks import BLOCK, blocks
from fedserver.tensor_source import TensorFile, TensorSource


@dataclass(frozen=True, slots=True)
class LateFile:
    """A late update's file, the model that it started from, what its site said of it."""

    site: str
    round: int
    path: Path
    started_from: Path
    report: SiteReport
    registered_examples: int

    @property
    def label(self) -> str:
        """What messages call it; never a site's name alone, whose own update may be there too."""
        return f"{self.site} (late, of round {self.round})"


def late_share(late_weight: float, rounds_late: int) -> float:
    """The part of its weight that a late update counts."""
    return late_weight**rounds_late


def rebase(
    update: TensorSource, started_from: TensorFile, model: TensorFile, parameters: Collection[str], out: Path
) -> str:
    """Write the update as if it had started from `model` to the file `out`; returns the digest. A block at a time.

    Raises StorageError if a file has shrunk.
    """
    ours, theirs, before = (bytearray(BLOCK * 8) for _ in range(3))
    digest = hashlib.sha256()
    in_model = {spec.name for spec in model.manifest.tensors}
    with out.open("wb") as file:
        header = update.manifest.header()
        digest.update(header)
        file.write(header)
        for spec in update.manifest.tensors:
            floating = TORCH_DTYPES[spec.dtype].is_floating_point
            moves = floating and spec.name in in_model and kind_of(spec.name, parameters) == PARAMETERS
            for first, count in blocks(spec):
                block = update.read(spec, first, count, theirs)
                if moves:
                    step = block.double() - started_from.read(spec, first, count, before)
                    block = (model.read(spec, first, count, ours) + step).to(TORCH_DTYPES[spec.dtype])
                data = block.contiguous().view(torch.uint8).numpy().data
                digest.update(data)
                file.write(data)
    return digest.hexdigest()
