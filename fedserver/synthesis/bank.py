"""The bank: the impressions that go to the sites, and what of it the next round goes on with.

Every round starts from the bank before it: the images of a class that are oldest make room for new ones, those
past their age leave in any case, and what stays is only touched up, a fraction of the work. Source of warm
starts: Fang et al. 2022, "Up to 100x Faster Data-free Knowledge Distillation", arXiv:2112.06253 (there a
generator's, here the images' own).

Legend: M images, C channels, H x W pixels, K classes, D features.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fedcore.errors import StorageError
from fedcore.models.state_file import load_tensors, save_state
from fedcore.plan import Plan

_TENSORS = ("images", "labels", "born", "soft_targets", "features")
# Log-probabilities below this count for nothing, and float16 ends at 65504.
LOWEST = -60_000.0


@dataclass(frozen=True, slots=True)
class Bank:
    """Impressions as they travel.

    `images` uint8 [M, C, H, W]; `labels` int64 [M]; `born` int64 [M], the round in which each was begun;
    `soft_targets` float16 [M, K], the global model's log-probabilities; `features` float16 [M, D], its
    features.
    """

    images: Tensor
    labels: Tensor
    born: Tensor
    soft_targets: Tensor
    features: Tensor

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, born: Tensor, logits: Tensor, features: Tensor) -> Self:
        """Assemble from what a model answers: `logits` and `features` in any floating type and place."""
        soft = logits.float().log_softmax(1).clamp_min(LOWEST)
        half = features.float().clamp(LOWEST, -LOWEST)
        return cls(images.cpu(), labels.cpu(), born.cpu(), soft.half().cpu(), half.half().cpu())

    def __len__(self) -> int:
        """Number of impressions."""
        return len(self.labels)

    def __getitem__(self, chosen: Tensor) -> Self:
        """Those impressions, by a mask or by positions."""
        return type(self)(*(getattr(self, name)[chosen] for name in _TENSORS))

    def save(self, path: Path) -> str:
        """Write the bank as an artifact and return its digest."""
        return save_state(path, {name: getattr(self, name).contiguous() for name in _TENSORS})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a bank. Raises StorageError if the file is damaged or holds something else."""
        tensors = load_tensors(path)
        if set(tensors) != set(_TENSORS) or len({len(tensor) for tensor in tensors.values()}) != 1:
            raise StorageError(f"{path}: not a bank of impressions, it holds {sorted(tensors)[:6]}")
        return cls(**tensors)


def bank_bytes(plan: Plan, features: int) -> int:
    """Payload bytes of a plan's whole bank. `features` is D."""
    labels_and_born = 16
    return plan.synthesis.images * (
        math.prod(plan.model.input) + labels_and_born + 2 * plan.model.classes + 2 * features
    )


def class_sizes(count: int, classes: int, generator: torch.Generator) -> list[int]:
    """How many of `count` images each class has: as many as any other, or one more.

    Which have one more is drawn by the generator; the same generator state gives the same classes.
    """
    extra = torch.randperm(classes, generator=generator)[: count % classes].tolist()
    return [count // classes + (k in extra) for k in range(classes)]


@dataclass(frozen=True, slots=True)
class Composition:
    """What a round's bank is made of: images kept from the bank before, and labels of those to begin."""

    # Positions in the bank before, int64.
    kept: Tensor
    # Labels [F] of new images.
    fresh: Tensor


def compose(
    sizes: Sequence[int],
    previous: Bank | None,
    round_number: int,
    *,
    refresh: float,
    max_age_rounds: int,
    generator: torch.Generator,
) -> Composition:
    """Decide which images of `previous` stay and how many of each class are begun anew.

    Of a class with n images at least round(refresh * n) are new; the youngest stay (ties by position), none
    for more than `max_age_rounds` rounds. New labels come in an order of the generator's, so that any stretch
    of them is about balanced.
    """
    kept: list[int] = []
    fresh: list[int] = []
    for label, size in enumerate(sizes):
        stay: list[int] = []
        if previous is not None:
            born = previous.born.tolist()
            own = [i for i, y in enumerate(previous.labels.tolist()) if y == label]
            young = [i for i in own if round_number - born[i] < max_age_rounds]
            stay = sorted(young, key=lambda i: (-born[i], i))[: size - round(refresh * size)]
        kept += sorted(stay)
        fresh += [label] * (size - len(stay))
    order = torch.randperm(len(fresh), generator=generator)
    return Composition(
        torch.tensor(sorted(kept), dtype=torch.int64), torch.tensor(fresh, dtype=torch.int64)[order]
    )
