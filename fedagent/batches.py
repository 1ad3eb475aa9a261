"""Which images a batch holds: seeded orders, and impressions drawn beside them.

Legend: N images at the site, B in a batch, M impressions in the bank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def batch_bounds(num_examples: int, batch_size: int) -> list[tuple[int, int]]:
    """First and last (exclusive) position of each batch of an epoch.

    The last batch may be smaller; a remainder of one image joins the batch before, because the statistics of
    BatchNorm over a single image train nothing.
    """
    bounds = [(start, min(start + batch_size, num_examples)) for start in range(0, num_examples, batch_size)]
    if len(bounds) > 1 and bounds[-1][1] - bounds[-1][0] == 1:
        bounds[-2:] = [(bounds[-2][0], num_examples)]
    return bounds


class EpochOrder:
    """Batches of an epoch, a new order each time.

    A lone image is repeated, so that no batch holds just one.
    """

    def __init__(self, num_examples: int, batch_size: int, generator: torch.Generator) -> None:
        """`batch_size` below 2 counts as 2. `generator` is a CPU generator of this object's own."""
        self._num_examples = num_examples
        self._generator = generator
        self._bounds = batch_bounds(max(2, num_examples), max(2, batch_size))

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._bounds)

    def epoch(self) -> Iterator[Tensor]:
        """Indices [B] of each batch, int64."""
        order = torch.randperm(self._num_examples, generator=self._generator)
        if self._num_examples == 1:
            order = order.repeat(2)
        for start, stop in self._bounds:
            yield order[start:stop]


class ImpressionSampler:
    """Draws impressions from a bank, all alike or by weight.

    Without weights: in shuffled turns through the bank, so none comes twice before all have come. With
    weights, [M] and not all zero: in turns too, each of which holds impression i about M * w_i / sum(w) times
    (the fraction is drawn), so that what a turn holds is as near to its shares as whole numbers can be.
    """

    def __init__(self, size: int, generator: torch.Generator, weights: Tensor | None = None) -> None:
        self._size = size
        self._generator = generator
        self._expected = (
            None if weights is None else weights.double().cpu() * size / weights.double().sum().cpu()
        )
        self._queue = torch.empty(0, dtype=torch.int64)
        self._seen = torch.zeros(size, dtype=torch.bool)

    def draw(self, count: int) -> Tensor:
        """Indices [count] into the bank, int64."""
        while len(self._queue) < count:
            self._queue = torch.cat([self._queue, self._turn()])
        drawn, self._queue = self._queue[:count], self._queue[count:]
        self._seen[drawn] = True
        return drawn

    @property
    def num_distinct(self) -> int:
        """How many different impressions have been drawn."""
        return int(self._seen.sum())

    def _turn(self) -> Tensor:
        if self._expected is None:
            return torch.randperm(self._size, generator=self._generator)
        fraction = torch.rand(self._size, generator=self._generator, dtype=torch.float64)
        times = (self._expected + fraction).floor().long()
        turn = torch.arange(self._size).repeat_interleave(times)
        return turn[torch.randperm(len(turn), generator=self._generator)]


def impressions_in_batch(num_real: int, ratio: float) -> int:
    """Impressions beside so many real images: the ratio, rounded; at least one unless the ratio is 0."""
    return max(1, round(num_real * ratio)) if ratio > 0 else 0
