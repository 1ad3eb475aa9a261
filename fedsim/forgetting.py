# ruff: noqa: N803 - shape suffixes
"""What local training makes a site forget: the drop in recall of classes that the site hardly has.

A site's model is scored on the sites' pooled validation images before and after its training of a round. A
site's forgetting is the mean drop over the classes that make up less than 1 % of its training images; a round's,
the mean over such sites. Only a simulation can measure this: it needs all sites' images beside every update.

Legend: K classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from fedagent.local_state import LocalState
from fedagent.trainer import load_model, with_own
from fedcore.data import LabelledImages
from fedcore.device import ComputeDevice
from fedcore.evaluation import evaluate, recalls
from fedcore.models.state_file import load_tensors
from fedcore.plan import Plan
from fedserver.decoding import read_update

RARE_SHARE = 0.01
Recalls = Sequence[float | None]


def rare_classes(counts_K: Sequence[int]) -> list[int]:
    """Classes below 1 % of a site's training images, those it lacks included."""
    total = sum(counts_K)
    return [k for k, count in enumerate(counts_K) if count < RARE_SHARE * total]


def recall_drop(before_K: Recalls, after_K: Recalls, classes: Sequence[int]) -> float | None:
    """Mean drop in recall over `classes`; None if there are no images of any of them."""
    drops = [b - a for k in classes if (b := before_K[k]) is not None and (a := after_K[k]) is not None]
    return sum(drops) / len(drops) if drops else None


class ForgettingMeter:
    """Measures one round after the other.

    `measure` after each site's training, `close` after the last site's.
    """

    def __init__(self, plan: Plan, images: LabelledImages, device: ComputeDevice) -> None:
        self._plan = plan
        self._images = images
        self._device = device
        self._drops: list[float] = []
        self._global: tuple[Path, Recalls] | None = None

    def measure(
        self, site: str, round_number: int, counts_K: Sequence[int], *, start: Path, update: Path,
        own_tensors: Sequence[str], state: Path,
    ) -> None:  # fmt: skip
        """Score a site's model before its training (`start`) and after it (`update`).

        Raises StorageError, TensorMismatchError if a file is damaged.
        """
        rare = rare_classes(counts_K)
        if not rare:
            return
        before = self._before(site, round_number, start, own_tensors, state)
        trained = read_update(update, start, self._plan.transfer)
        if own_tensors:
            kept = LocalState(state).newest() or {}
            trained |= {name: kept[name] for name in own_tensors}
        drop = recall_drop(before, self._recalls(trained, site, rare), rare)
        if drop is not None:
            self._drops.append(drop)

    def close(self) -> float | None:
        """The round's forgetting; None if no site lacks a class that there are images of."""
        drops, self._drops, self._global = self._drops, [], None
        return sum(drops) / len(drops) if drops else None

    def _before(
        self, site: str, round_number: int, start: Path, own_tensors: Sequence[str], state: Path
    ) -> Recalls:
        if own_tensors:
            own = LocalState(state).before(round_number)
            return self._recalls(with_own(load_tensors(start), own_tensors, own), site)
        # All sites start from the same model: one pass serves them.
        if self._global is None or self._global[0] != start:
            self._global = (start, self._recalls(load_tensors(start), site))
        return self._global[1]

    def _recalls(
        self, state: Mapping[str, Tensor], site: str, classes: Sequence[int] | None = None
    ) -> Recalls:
        """Recall of each class; only those of `classes` if given, which is less work."""
        images = self._images
        if classes is not None:
            images = images.take(np.flatnonzero(np.isin(images.labels, classes)))
        model = load_model(self._plan, state, self._device, site)
        return recalls(evaluate(model, images, self._plan, self._device.device, per_class=True))
