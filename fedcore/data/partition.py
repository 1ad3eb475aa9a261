"""Splitting one labelled set over simulated sites: for demos, benchmarks and research. numpy only.

Each function returns one sorted index array a site; together they hold every index once. All randomness comes
from `seed`. Legend: S sites, K classes, N images.
"""

from collections.abc import Sequence

import numpy as np

from fedcore.data.dataset import IndexArray, LabelArray
from fedcore.data.splits import apportion
from fedcore.errors import DataError

_ATTEMPTS = 50


def iid(labels: LabelArray, num_sites: int, *, seed: int) -> list[IndexArray]:
    """Sites of equal size (to within one image), drawn at random. Raises DataError."""
    _check(labels, num_sites, 1)
    order = np.random.default_rng(seed).permutation(len(labels))
    return [np.sort(part) for part in np.array_split(order, num_sites)]


def dirichlet(
    labels: LabelArray, num_sites: int, alpha: float, *, seed: int, min_size: int = 10
) -> list[IndexArray]:
    """Label skew: each class goes to the sites in proportions drawn from Dirichlet(alpha).

    Drawn again until every site has `min_size` images; if 50 draws don't get there, the best of them is
    mended: the smallest sites are filled up from the most frequent class of the largest. Raises DataError if
    there are too few images. Source: Yurochkin et al. 2019, Bayesian Nonparametric Federated Learning of
    Neural Networks, section 4.
    """
    _check(labels, num_sites, min_size)
    if not alpha > 0:
        raise DataError(f"dirichlet split: alpha is {alpha}, expected a number above 0")
    rng = np.random.default_rng(seed)
    best: IndexArray | None = None
    for _ in range(_ATTEMPTS):
        owner = _draw_owners(labels, num_sites, alpha, rng)
        sizes = np.bincount(owner, minlength=num_sites)
        if best is None or sizes.min() > np.bincount(best, minlength=num_sites).min():
            best = owner
        if sizes.min() >= min_size:
            break
    assert best is not None
    return _by_owner(_mend(best, labels, num_sites, min_size, rng), num_sites)


def shards(labels: LabelArray, num_sites: int, *, shards_per_site: int = 2, seed: int) -> list[IndexArray]:
    """Label skew: images sorted by class, cut into equal shards, and dealt so many to a site.

    Raises DataError if there are fewer images than shards. Source: McMahan et al. 2017,
    Communication-Efficient Learning of Deep Networks from Decentralized Data, section 3.
    """
    if shards_per_site < 1:
        raise DataError(f"shard split: {shards_per_site} shards a site, expected at least 1")
    _check(labels, num_sites, shards_per_site)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    pieces = np.array_split(order, num_sites * shards_per_site)
    dealt = rng.permutation(len(pieces)).reshape(num_sites, shards_per_site)
    return [np.sort(np.concatenate([pieces[n] for n in row])) for row in dealt]


def quantity_skew(
    labels: LabelArray, num_sites: int, alpha: float, *, seed: int, min_size: int = 10
) -> list[IndexArray]:
    """Sites of unequal size with like labels: sizes in proportions drawn from Dirichlet(alpha), `min_size`
    for each.

    Raises DataError. Source: Li et al. 2022, Federated Learning on Non-IID Data Silos, section 4.3.
    """
    _check(labels, num_sites, min_size)
    if not alpha > 0:
        raise DataError(f"quantity split: alpha is {alpha}, expected a number above 0")
    rng = np.random.default_rng(seed)
    spare = len(labels) - num_sites * min_size
    sizes = min_size + apportion(rng.dirichlet(np.full(num_sites, alpha)), spare)
    order = rng.permutation(len(labels))
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes)[:-1])]


def proportional_split(
    labels: LabelArray, site_class_counts: Sequence[Sequence[int]], *, seed: int = 0
) -> list[IndexArray]:
    """Deal a pooled validation or test set to sites in the class proportions of their training images [S, K].

    Each class goes by the largest remainder; a class that no site trains on goes by the sites' sizes. Raises
    DataError if a label has no column.
    """
    counts = np.asarray(site_class_counts, dtype=np.int64)
    if len(labels) and int(labels.max()) >= counts.shape[1]:
        raise DataError(f"proportional split: label {int(labels.max())}, expected 0..{counts.shape[1] - 1}")
    rng = np.random.default_rng(seed)
    owner = np.zeros(len(labels), dtype=np.int64)
    for k in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == k))
        weights = counts[:, k] if counts[:, k].any() else counts.sum(axis=1)
        owner[members] = np.repeat(np.arange(len(counts)), apportion(weights, len(members)))
    return _by_owner(owner, len(counts))


def class_counts(labels: LabelArray, num_classes: int) -> list[int]:
    """How many images each class has, [K]."""
    return [int(n) for n in np.bincount(labels, minlength=num_classes)]


def _draw_owners(labels: LabelArray, num_sites: int, alpha: float, rng: np.random.Generator) -> IndexArray:
    owner = np.zeros(len(labels), dtype=np.int64)
    for k in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == k))
        shares = rng.dirichlet(np.full(num_sites, alpha))
        owner[members] = np.repeat(np.arange(num_sites), apportion(np.nan_to_num(shares), len(members)))
    return owner


def _mend(
    owner: IndexArray, labels: LabelArray, num_sites: int, min_size: int, rng: np.random.Generator
) -> IndexArray:
    owner = owner.copy()
    while (sizes := np.bincount(owner, minlength=num_sites)).min() < min_size:
        poor, rich = int(sizes.argmin()), int(sizes.argmax())
        held = np.flatnonzero(owner == rich)
        commonest = np.bincount(labels[held]).argmax()
        wanted = min(min_size - int(sizes[poor]), int(sizes[rich]) - min_size)
        owner[rng.permutation(held[labels[held] == commonest])[:wanted]] = poor
    return owner


def _by_owner(owner: IndexArray, num_sites: int) -> list[IndexArray]:
    return [np.flatnonzero(owner == site).astype(np.int64) for site in range(num_sites)]


def _check(labels: LabelArray, num_sites: int, min_size: int) -> None:
    if num_sites < 1:
        raise DataError(f"{num_sites} sites, expected at least 1")
    if len(labels) < num_sites * max(min_size, 1):
        raise DataError(
            f"{len(labels)} images are too few for {num_sites} sites of at least {max(min_size, 1)} each",
            hint="ask for fewer sites",
        )
