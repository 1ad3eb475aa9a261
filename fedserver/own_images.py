# ruff: noqa: N803, N806 - shape suffixes
"""Images of the coordinator's own, as the plan's section `evaluation` names them; they stay loaded between commands.

Legend: N images.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedcore.data import LabelledImages, open_dataset
from fedcore.data.dataset import IndexArray, LabelArray
from fedcore.data.npz_reader import read_held_out
from fedcore.errors import DataError
from fedcore.plan import Plan
from fedcore.seeding import derive_seed


class OwnImages:
    """What one key of the plan names. Read again only when the file, or what the plan makes of it, has changed."""

    def __init__(self, key: str, what: str, read: Callable[[Path, Plan], LabelledImages]) -> None:
        """`key` and `what` are how messages call the file and the images that `read` takes from it."""
        self._key = key
        self._what = what
        self._read = read
        self._held: tuple[object, LabelledImages] | None = None

    def of(self, plan: Plan, path: Path) -> LabelledImages:
        """The images, at least one. Raises DataError if there are none, or the file can't be read."""
        try:
            changed = path.stat().st_mtime_ns
        except OSError as error:
            raise DataError(f"{self._key}: {path}: can't be read: {error.strerror}") from error
        asked = (
            path, changed, plan.model.input, plan.model.classes, plan.data, plan.transform, plan.evaluation, plan.seed
        )  # fmt: skip
        if self._held is None or self._held[0] != asked:
            self._held = None
            images = self._read(path, plan)
            if not len(images):
                raise DataError(f"{self._key}: {path}: has no {self._what}")
            self._held = (asked, images)
        return self._held[1]


def read_test_images(path: Path, plan: Plan) -> LabelledImages:
    """The test images of `evaluation.data`. Raises DataError, PlanError."""
    return open_dataset("npz", path, class_names=plan.data.class_names).read(plan).test


def read_scoring_images(path: Path, plan: Plan) -> LabelledImages:
    """The images of `evaluation.updates_data` that updates are scored on. Raises DataError, PlanError."""
    images = read_held_out(path, plan)
    seed = derive_seed(plan.seed, "images to score updates")
    return images.take(balanced_sample(images.labels, plan.evaluation.updates_images, seed))


def balanced_sample(labels_N: LabelArray, most: int, seed: int) -> IndexArray:
    """Indices of at most `most` labels, sorted: as many of each class as of any other, as far as they go.

    A recall is as exact as its class has images, so all classes get the same number before any gets more.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels_N))
    rank_N = np.zeros(len(labels_N), dtype=np.int64)
    for label in np.unique(labels_N):
        own = order[labels_N[order] == label]
        rank_N[own] = np.arange(len(own))
    chosen = order[np.argsort(rank_N[order], kind="stable")][:most]
    return np.sort(chosen).astype(np.int64)
