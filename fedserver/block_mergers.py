"""How the blocks of one tensor of all sites become a block of the merged model.

Two mergers: a weighted sum of models, which takes a site's block at a time, and rules of coordinates, which need a block
of every site side by side. Both give BatchNorm's variances the spread of the sites' means.

Legend: S sites, C channels, E elements of a block.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedcore.models.state_file import TORCH_DTYPES
from fedcore.tensor_file import TensorSpec
from fedserver.robust.norms import side_by_side
from fedserver.tensor_blocks import BLOCK, blocks
from fedserver.tensor_source import TensorSource


class NotFiniteError(Exception):
    """The merged tensor `name` holds NaN or Inf: some site's update does, and has to be found."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True, slots=True)
class Summands:
    """Files and what each counts; the weights of a mean sum to one."""

    files: Sequence[TensorSource]
    weights: Sequence[float]


class BlockMerger(ABC):
    """Merges one tensor after another. The blocks that it yields are valid until the next. Raises NotFiniteError."""

    @abstractmethod
    def integers(self, spec: TensorSpec) -> Iterator[Tensor]:
        """An integer buffer."""

    @abstractmethod
    def floats(self, spec: TensorSpec) -> Iterator[Tensor]:
        """A floating tensor."""

    @abstractmethod
    def variance(self, spec: TensorSpec, mean: TensorSpec) -> Iterator[Tensor]:
        """A variance [C] that belongs to the tensor `mean` [C]."""


class SumMerger(BlockMerger):
    """Weighted sums; integers take the maximum. Of each tensor `summands(name)` tells files and weights.

    Its buffers are used again and again.
    """

    def __init__(self, summands: Callable[[str], Summands]) -> None:
        self._summands = summands
        self._buffer = bytearray(BLOCK * 8)
        self._total = torch.empty(BLOCK, dtype=torch.float64)
        self._scratch = torch.empty(BLOCK, dtype=torch.float64)

    def integers(self, spec: TensorSpec) -> Iterator[Tensor]:
        """The maximum over the files."""
        files = self._summands(spec.name).files
        for first, count in blocks(spec):
            highest = files[0].read(spec, first, count, self._buffer).clone()
            for file in files[1:]:
                torch.maximum(highest, file.read(spec, first, count, self._buffer), out=highest)
            yield highest

    def floats(self, spec: TensorSpec) -> Iterator[Tensor]:
        """The weighted sum, accumulated in float64 in the order of the files."""
        summands = self._summands(spec.name)
        for first, count in blocks(spec):
            read = (file.read(spec, first, count, self._buffer) for file in summands.files)
            total = weighted_sum(read, summands.weights, self._total[:count], self._scratch[:count])
            yield narrowed(total, spec)

    def variance(self, spec: TensorSpec, mean: TensorSpec) -> Iterator[Tensor]:
        """The variance of the files' pooled statistics."""
        summands = self._summands(spec.name)

        def sites() -> Iterator[tuple[Tensor, Tensor]]:
            return ((file.whole(mean), file.whole(spec)) for file in summands.files)

        yield narrowed(pooled_variance(sites, summands.weights), spec)


class CoordinateMerger(BlockMerger):
    """A rule of the values that the sites have at each coordinate, every site counting the same.

    `rule` maps values [S, E] to [E] in float64, `integer_rule` integers to integers. A variance is the rule of the sites'
    mean squares about the merged mean: for the plain mean as the rule, the variance of their pooled statistics.
    """

    def __init__(
        self,
        files: Sequence[TensorSource],
        rule: Callable[[Tensor], Tensor],
        integer_rule: Callable[[Tensor], Tensor],
    ) -> None:
        self._files = files
        self._rule = rule
        self._integer_rule = integer_rule

    def integers(self, spec: TensorSpec) -> Iterator[Tensor]:
        """The rule of integers."""
        return (self._integer_rule(values_SE) for values_SE in side_by_side(self._files, spec))

    def floats(self, spec: TensorSpec) -> Iterator[Tensor]:
        """The rule of floats."""
        return (narrowed(self._rule(values_SE), spec) for values_SE in side_by_side(self._files, spec))

    def variance(self, spec: TensorSpec, mean: TensorSpec) -> Iterator[Tensor]:
        """The rule of the mean squares about the rule of the means."""
        means_SC = torch.stack([file.whole(mean).double() for file in self._files])
        variances_SC = torch.stack([file.whole(spec).double() for file in self._files])
        squares_SC = variances_SC + (means_SC - self._rule(means_SC)).square()
        yield narrowed(self._rule(squares_SC), spec)


def weighted_sum(read: Iterable[Tensor], weights: Sequence[float], total: Tensor, scratch: Tensor) -> Tensor:
    """Sum of `weights[i] * read[i]`, into `total`; both float64 buffers have the blocks' shape."""
    total.zero_()
    for block, weight in zip(read, weights, strict=True):
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


def narrowed(total: Tensor, spec: TensorSpec) -> Tensor:
    """Float64 numbers in the tensor's own dtype. Raises NotFiniteError."""
    narrow = total.to(TORCH_DTYPES[spec.dtype])
    # A sum is finite if and only if every summand is: one pass checks all sites.
    if not math.isfinite(float(narrow.sum(dtype=torch.float64))):
        raise NotFiniteError(spec.name)
    return narrow
