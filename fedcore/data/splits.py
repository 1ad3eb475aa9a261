"""Validation and test splits for data that has none: cut from the training images, the same in every run."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from fedcore.data.dataset import IndexArray, Split
from fedcore.seeding import derive_seed


def cut_held_out(
    labels: Sequence[Hashable], *, validation_fraction: float, test_fraction: float
) -> Mapping[Split, IndexArray]:
    """Split a site's images into train, validation and test; fractions are shares of all `labels`.

    As `cut_held_out_by`, but the draw depends on the number of labels alone, not on a run's seed: what one
    run tests on, no run has trained on.
    """
    return cut_held_out_by(
        labels,
        validation_fraction=validation_fraction,
        test_fraction=test_fraction,
        seed=derive_seed(0, "held-out split", len(labels)),
    )


def cut_held_out_by(
    labels: Sequence[Hashable], *, validation_fraction: float, test_fraction: float, seed: int
) -> Mapping[Split, IndexArray]:
    """Indices of `labels` for train, validation and test, each sorted, stratified, drawn by `seed`.

    A class with one image keeps it in `train`.
    """
    codes = _codes(labels)
    rng = np.random.default_rng(seed)
    test = stratified_sample(codes, round(test_fraction * len(codes)), rng)
    rest = np.setdiff1d(np.arange(len(codes)), test)
    validation = rest[stratified_sample(codes[rest], round(validation_fraction * len(codes)), rng)]
    return {"train": np.setdiff1d(rest, validation), "validation": validation, "test": test}


def stratified_sample(labels: IndexArray, size: int, rng: np.random.Generator) -> IndexArray:
    """Draw `size` indices of `labels`, each class by its share (largest remainder), sorted.

    Leaves one of each class undrawn, so the sample may be smaller than `size`.
    """
    classes, counts = np.unique(labels, return_counts=True)
    quota = apportion(counts, min(size, len(labels)))
    quota = np.minimum(quota, counts - 1)
    drawn = [
        rng.permutation(np.flatnonzero(labels == k))[:wanted]
        for k, wanted in zip(classes, quota, strict=True)
    ]
    return np.sort(np.concatenate(drawn)).astype(np.int64) if drawn else np.zeros(0, dtype=np.int64)


def apportion(weights: np.ndarray, total: int) -> IndexArray:
    """Whole numbers that sum to `total`, in proportion to non-negative weights, by the largest remainder.

    Equal remainders go to the earlier entry; all weights zero counts as all equal.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if len(weights) == 0:
        assert total == 0
        return np.zeros(0, dtype=np.int64)
    if weights.sum() == 0:
        weights = np.ones_like(weights)
    exact = weights * (total / weights.sum())
    whole: IndexArray = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: total - int(whole.sum())]] += 1
    return whole


def _codes(labels: Sequence[Hashable]) -> IndexArray:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)
