"""Whole federations for demos and research: one labelled set dealt over simulated sites, or real sites.

| name | source |
|---|---|
| digits | scikit-learn's bundled 8x8 scans of handwritten digits (Alpaydin & Kaynak 1998, UCI optdigits,
test part) |
| bloodmnist | an npz with MedMNIST's keys and BloodMNIST's eight classes (Acevedo et al. 2020; Yang et al.
2023) |
| wbc_multisite | four real sites' white blood cells (pbc, tecom, cellavision, bccd), four classes |
| PATH.npz | any npz with MedMNIST's keys; {train,val,test}_sites, if there, tell each image's real site |

No torch here. The same arguments give the same split on every machine; `partition_record` says which image is where,
`load_recorded` loads that again and checks the bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.data import partition
from fedcore.data.benchmark_sources import (
    BENCHMARK_NAMES,
    REAL_SITES,
    WBC_SITES,
    Cut,
    Source,
    images_digest,
    read_source,
)
from fedcore.data.dataset import SPLITS, IndexArray, LabelledImages, Split
from fedcore.data.feature_shift import Shift, apply_shift, draw_shift
from fedcore.data.partition_scheme import BY_SITE, Scheme, choose_scheme, deal, scheme_of
from fedcore.data.saved_partition import SavedPartition, check_record, read_record
from fedcore.data.splits import stratified_sample
from fedcore.errors import ConfigError, DataError
from fedcore.seeding import derive_seed

__all__ = [
    "BENCHMARK_NAMES",
    "Federation",
    "SiteSplit",
    "load_benchmark",
    "load_partition",
    "load_recorded",
    "partition_record",
    "write_site",
]

DEFAULT_SITES = 4
HELD_OUT: tuple[Split, ...] = ("validation", "test")


@dataclass(frozen=True, slots=True)
class SiteSplit:
    """What one site holds.

    `indices` says which images of the data set these are and `shift` how they were changed, where that is known.
    """

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    indices: Cut | None = None
    shift: Shift | None = None

    @property
    def parts(self) -> tuple[LabelledImages, LabelledImages, LabelledImages]:
        """Train, validation, test."""
        return self.train, self.validation, self.test


@dataclass(frozen=True, slots=True)
class Federation:
    """A benchmark's sites by name, in order, and what a plan needs to know of them.

    `input` is (channels, height, width). `pooled_test` holds the images of all sites' test splits. `method`
    is how the images were dealt: "dirichlet", "iid", "shards", "quantity" or "real sites"; `partition` says it with
    its numbers (`fedcore.data.partition_scheme`), "" for sites of your own. `data_sha256` is the digest of the whole
    data set.
    """

    dataset: str
    sites: Mapping[str, SiteSplit]
    class_names: tuple[str, ...]
    input: tuple[int, int, int]
    pooled_test: LabelledImages
    description: str
    method: str
    alpha: float | None
    seed: int
    max_train: int | None = None
    partition: str = ""
    data_sha256: str | None = None


def load_benchmark(
    dataset: str,
    data_path: Path | None = None,
    *,
    sites: int | None = None,
    alpha: float | None = None,
    seed: int = 0,
    max_train: int | None = None,
    partition: str | None = None,
) -> Federation:
    """Load `dataset` and deal it over `sites` (4 unless said otherwise).

    `partition` is a scheme's text (`fedcore.data.partition_scheme`). Without it `alpha` is the Dirichlet label skew,
    and None deals alike; `wbc_multisite` has its own sites, and an `alpha` alone says nothing of them. `max_train`
    cuts the training images in all to a stratified sample. Validation and test images go to the sites in their
    training class proportions. Raises DataError if the data is not there or can't be dealt so, ConfigError if
    `partition` is wrong or contradicts `alpha` or the data set.
    """
    real = dataset == REAL_SITES
    scheme = choose_scheme(
        partition, None if real and partition is None else alpha, dataset=dataset, real_sites=real
    )
    return _deal(read_source(dataset, data_path), scheme, sites=sites, seed=seed, max_train=max_train)


def write_site(split: SiteSplit, path: Path) -> None:
    """Write a site's splits as an npz with MedMNIST's keys, images [N, H, W, C], labels [N, 1]."""
    arrays: dict[str, NDArray[Any]] = {}
    for key, part in zip(("train", "val", "test"), split.parts, strict=True):
        arrays[f"{key}_images"] = part.images
        arrays[f"{key}_labels"] = part.labels[:, np.newaxis]
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def partition_record(federation: Federation) -> dict[str, Any]:
    """What gives this split again, and what it is: JSON-able. Class counts are of training images."""
    return {
        "dataset": federation.dataset,
        "data_sha256": federation.data_sha256,
        "partition": federation.partition,
        "method": federation.method,
        "alpha": federation.alpha,
        "seed": federation.seed,
        "max_train": federation.max_train,
        "class_names": list(federation.class_names),
        "input": list(federation.input),
        "description": federation.description,
        "sites": {
            name: _site_record(split, len(federation.class_names)) for name, split in federation.sites.items()
        },
    }


def load_recorded(
    record: Mapping[str, Any], data_path: Path | None = None, *, who: str | None = None
) -> Federation:
    """Load the split of a `partition_record`: by its indices, or dealt again where it has none.

    Raises DataError, which calls the record `who`, if it is damaged or the data is not what it was made of.
    """
    saved = check_record(record, who or f"split of {record.get('dataset')}")
    who = who or f"split of {saved.dataset}"
    source = read_source(saved.dataset, data_path)
    if saved.data_sha256 not in (None, source.sha256):
        raise DataError(
            f"{who}: made of other images: {data_path or saved.dataset} has sha256 {source.sha256[:12]}..., "
            f"expected {saved.data_sha256[:12]}...",
            hint="give the file that it was made of",
        )
    scheme = _scheme_of(saved, who)
    if any(site.indices is None for site in saved.sites.values()):
        count = None if scheme.method == BY_SITE else len(saved.sites)
        federation = _deal(source, scheme, sites=count, seed=saved.seed, max_train=saved.max_train)
    else:
        dealt = _indices_of(saved, len(source.images), who)
        federation = _federation(
            source, scheme, dealt, _shifts_of(saved, source, who), saved.seed, saved.max_train
        )
    for name, site in saved.sites.items():
        if name not in federation.sites or images_digest(federation.sites[name].parts) != site.sha256:
            raise DataError(
                f"{who}: {name} is not as recorded (sha256 {site.sha256[:12]}...)",
                hint="the record is damaged, or the data file or the version of numpy or fedimpres is another one",
            )
    return federation


def load_partition(path: Path, data_path: Path | None = None, *, dataset: str | None = None) -> Federation:
    """Load the split that a partition.json holds. `dataset`, if given, must be its data set. Raises DataError."""
    record = read_record(path)
    recorded = str(record["dataset"])
    own_file = recorded.endswith(".npz") and (dataset or "").endswith(".npz")
    if dataset is not None and dataset != recorded and not own_file:
        raise DataError(
            f"{path}: is a split of '{recorded}', asked for '{dataset}'", hint="leave --dataset out"
        )
    # A file of the user's own may have moved: its digest says whether it is the one.
    return load_recorded({**record, "dataset": dataset} if own_file else record, data_path, who=str(path))


def _deal(
    source: Source, scheme: Scheme, *, sites: int | None, seed: int, max_train: int | None
) -> Federation:
    if scheme.method == BY_SITE:
        dealt = _by_site(source, sites, seed, max_train)
    else:
        dealt = _over_sites(source, scheme, DEFAULT_SITES if sites is None else sites, seed, max_train)
    channels = source.images.images.shape[3]
    shifts = {
        name: draw_shift(scheme.shift, channels, seed=derive_seed(seed, "feature shift", name))
        for name in dealt
        if scheme.shift
    }
    return _federation(source, scheme, dealt, shifts, seed, max_train)


def _by_site(source: Source, sites: int | None, seed: int, max_train: int | None) -> dict[str, Cut]:
    if source.dataset == REAL_SITES and sites not in (None, len(WBC_SITES)):
        raise DataError(
            f"wbc_multisite has {len(WBC_SITES)} real sites, got sites = {sites}", hint="leave it out"
        )
    dealt = source.site_pools(seed)
    if sites not in (None, len(dealt)):
        raise DataError(
            f"{source.dataset} has {len(dealt)} real sites, got sites = {sites}", hint="leave it out"
        )
    if max_train is not None:
        raise DataError(f"{source.dataset}: max_train is not for real sites", hint="leave it out")
    return dealt


def _over_sites(
    source: Source, scheme: Scheme, count: int, seed: int, max_train: int | None
) -> dict[str, Cut]:
    labels = source.images.labels
    pools = source.pools(seed)
    train = pools["train"]
    if max_train is not None and max_train < len(train):
        rng = np.random.default_rng(derive_seed(seed, "benchmark sample"))
        train = train[stratified_sample(labels[train], max_train, rng)]
    parts = [
        train[part] for part in deal(scheme, labels[train], count, seed=derive_seed(seed, "benchmark deal"))
    ]
    counts = [partition.class_counts(labels[part], len(source.class_names)) for part in parts]
    dealt: dict[Split, list[IndexArray]] = {"train": parts}
    for split in HELD_OUT:
        pool = pools[split]
        shares = partition.proportional_split(
            labels[pool], counts, seed=derive_seed(seed, "benchmark deal", split)
        )
        dealt[split] = [pool[share] for share in shares]
    return {f"site-{n + 1}": {split: dealt[split][n] for split in SPLITS} for n in range(count)}


def _federation(
    source: Source,
    scheme: Scheme,
    dealt: Mapping[str, Cut],
    shifts: Mapping[str, Shift],
    seed: int,
    max_train: int | None,
) -> Federation:
    sites = {name: _site(source, cut, shifts.get(name)) for name, cut in dealt.items()}
    if scheme.method == BY_SITE or shifts:
        pooled = _joined([split.test for split in sites.values()])
    else:
        pooled = source.images.take(np.sort(np.concatenate([cut["test"] for cut in dealt.values()])))
    _, height, width, channels = source.images.images.shape
    return Federation(
        dataset=source.dataset,
        sites=sites,
        class_names=source.class_names,
        input=(channels, height, width),
        pooled_test=pooled,
        description=source.description,
        method="real sites" if scheme.method == BY_SITE else scheme.method,
        alpha=scheme.alpha,
        seed=seed,
        max_train=max_train,
        partition=scheme.text,
        data_sha256=source.sha256,
    )


def _site(source: Source, cut: Cut, shift: Shift | None) -> SiteSplit:
    def taken(split: Split) -> LabelledImages:
        part = source.images.take(cut[split])
        return part if shift is None else LabelledImages(apply_shift(part.images, shift, split), part.labels)

    return SiteSplit(taken("train"), taken("validation"), taken("test"), indices=cut, shift=shift)


def _joined(parts: Sequence[LabelledImages]) -> LabelledImages:
    return LabelledImages(
        np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts])
    )


def _site_record(split: SiteSplit, classes: int) -> dict[str, Any]:
    record: dict[str, Any] = {
        "train": len(split.train),
        "validation": len(split.validation),
        "test": len(split.test),
        "class_counts": partition.class_counts(split.train.labels, classes),
        "sha256": images_digest(split.parts),
    }
    if split.shift is not None:
        record["shift"] = asdict(split.shift)
    if split.indices is not None:
        record["indices"] = {name: split.indices[name].tolist() for name in SPLITS}
    return record


def _scheme_of(saved: SavedPartition, who: str) -> Scheme:
    if saved.partition:
        try:
            return scheme_of(saved.partition)
        except ConfigError as error:
            raise DataError(
                f"{who}: {error.message}", hint="the record is damaged; use a whole one"
            ) from error
    real = saved.dataset == REAL_SITES
    return choose_scheme(None, None if real else saved.alpha, dataset=saved.dataset, real_sites=real)


def _indices_of(saved: SavedPartition, count: int, who: str) -> dict[str, Cut]:
    """Each site's indices as arrays. Raises DataError if one is out of range, out of order or there twice."""
    dealt: dict[str, Cut] = {}
    seen = np.zeros(count, dtype=bool)
    for name, site in saved.sites.items():
        cut: dict[Split, IndexArray] = {}
        for split in SPLITS:
            assert site.indices is not None
            indices = np.array(site.indices[split], dtype=np.int64)
            place = f"{who}: sites.{name}.indices.{split}"
            hint = "the record is damaged; use a whole one"
            if indices.max(initial=-1) >= count:
                raise DataError(f"{place}: {indices.max()}, the data set has {count} images", hint=hint)
            if (np.diff(indices) <= 0).any() or seen[indices].any():
                raise DataError(f"{place}: out of order, or an image is there twice", hint=hint)
            seen[indices] = True
            cut[split] = indices
        dealt[name] = cut
    return dealt


def _shifts_of(saved: SavedPartition, source: Source, who: str) -> dict[str, Shift]:
    channels = source.images.images.shape[3]
    shifts: dict[str, Shift] = {}
    for name, site in saved.sites.items():
        if site.shift is None:
            continue
        if len(site.shift.stain) != channels:
            raise DataError(
                f"{who}: sites.{name}.shift.stain: {len(site.shift.stain)} numbers for {channels} channels",
                hint="the record is damaged; use a whole one",
            )
        values = site.shift.model_dump()
        shifts[name] = Shift(**{**values, "stain": tuple(site.shift.stain)})
    return shifts
