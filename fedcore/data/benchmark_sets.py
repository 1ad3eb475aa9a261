"""Whole federations for demos and research: one labelled set dealt over simulated sites, or real sites.

| name | source |
|---|---|
| digits | scikit-learn's bundled 8x8 scans of handwritten digits (Alpaydin & Kaynak 1998, UCI optdigits,
test part) |
| bloodmnist | an npz with MedMNIST's keys and BloodMNIST's eight classes (Acevedo et al. 2020; Yang et al.
2023) |
| wbc_multisite | four real sites' white blood cells (pbc, tecom, cellavision, bccd), four classes |
| PATH.npz | any npz with MedMNIST's keys |

No torch here. The same arguments give the same split on every machine; `partition_record` says how to get it
again, `load_recorded` does and checks the bytes.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from fedcore.data import partition
from fedcore.data.dataset import SPLITS, ImageArray, IndexArray, LabelArray, LabelledImages, Split
from fedcore.data.images import convert_array
from fedcore.data.labels import check_label_array
from fedcore.data.npz_reader import FILE_KEYS, open_npz, read_array
from fedcore.data.splits import cut_held_out_by, stratified_sample
from fedcore.errors import DataError
from fedcore.seeding import derive_seed

BENCHMARK_NAMES = ("digits", "bloodmnist", "wbc_multisite")
BLOOD_CLASSES = (
    "basophil", "eosinophil", "erythroblast", "immature granulocyte", "lymphocyte", "monocyte", "neutrophil",
    "platelet",
)  # fmt: skip
WBC_SITES = ("pbc", "tecom", "cellavision", "bccd")
# The file's class 4, basophil, is left out: it hardly occurs outside pbc.
WBC_CLASSES = ("neutrophil", "lymphocyte", "monocyte", "eosinophil")
# pbc is a hundred times larger than cellavision; cut, the sites weigh alike.
WBC_MOST: Mapping[Split, int] = {"train": 300, "validation": 100, "test": 150}
DEFAULT_SITES = 4
HELD_OUT: tuple[Split, ...] = ("validation", "test")
REBUILT_BLOOD_MD5 = "2a6c54369dbe8819f9b2ee4ad840425d"


@dataclass(frozen=True, slots=True)
class SiteSplit:
    """What one site holds."""

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages


@dataclass(frozen=True, slots=True)
class Federation:
    """A benchmark's sites by name, in order, and what a plan needs to know of them.

    `input` is (channels, height, width). `pooled_test` holds the images of all sites' test splits. `method`
    is how the images were dealt: "dirichlet", "iid" or "real sites".
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


def load_benchmark(
    dataset: str,
    data_path: Path | None = None,
    *,
    sites: int | None = None,
    alpha: float | None = None,
    seed: int = 0,
    max_train: int | None = None,
) -> Federation:
    """Load `dataset` and deal it over `sites` (4 unless said otherwise).

    `alpha` is the Dirichlet label skew, None deals alike; `wbc_multisite` has its own sites and takes no
    alpha. `max_train` cuts the training images in all to a stratified sample. Validation and test images go
    to the sites in their training class proportions. Raises DataError if the data is not there or can't be
    dealt so.
    """
    if dataset == "wbc_multisite":
        return _real_sites(_existing(dataset, data_path), sites, seed, max_train)
    pools, names, description = _load_pools(dataset, data_path, seed)
    train = pools["train"]
    if max_train is not None and max_train < len(train):
        rng = np.random.default_rng(derive_seed(seed, "benchmark sample"))
        train = train.take(stratified_sample(train.labels, max_train, rng))
    count = DEFAULT_SITES if sites is None else sites
    dealt = _deal(train.labels, count, alpha, seed)
    counts = [partition.class_counts(train.labels[part], len(names)) for part in dealt]
    held_out: dict[Split, list[IndexArray]] = {
        split: partition.proportional_split(
            pools[split].labels, counts, seed=derive_seed(seed, "benchmark deal", split)
        )
        for split in HELD_OUT
    }
    shape = train.images.shape
    return Federation(
        dataset=dataset,
        sites={
            f"site-{n + 1}": SiteSplit(
                train.take(dealt[n]),
                pools["validation"].take(held_out["validation"][n]),
                pools["test"].take(held_out["test"][n]),
            )
            for n in range(count)
        },
        class_names=names,
        input=(shape[3], shape[1], shape[2]),
        pooled_test=pools["test"],
        description=description,
        method="iid" if alpha is None else "dirichlet",
        alpha=alpha,
        seed=seed,
        max_train=max_train,
    )


def write_site(split: SiteSplit, path: Path) -> None:
    """Write a site's splits as an npz with MedMNIST's keys, images [N, H, W, C], labels [N, 1]."""
    arrays: dict[str, NDArray[Any]] = {}
    for key, part in (("train", split.train), ("val", split.validation), ("test", split.test)):
        arrays[f"{key}_images"] = part.images
        arrays[f"{key}_labels"] = part.labels[:, np.newaxis]
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)


def partition_record(federation: Federation) -> dict[str, Any]:
    """What gives this split again, and what it is: JSON-able. Class counts are of training images."""
    classes = len(federation.class_names)
    return {
        "dataset": federation.dataset,
        "method": federation.method,
        "alpha": federation.alpha,
        "seed": federation.seed,
        "max_train": federation.max_train,
        "class_names": list(federation.class_names),
        "input": list(federation.input),
        "description": federation.description,
        "sites": {
            name: {
                "train": len(split.train),
                "validation": len(split.validation),
                "test": len(split.test),
                "class_counts": partition.class_counts(split.train.labels, classes),
                "sha256": _digest(split),
            }
            for name, split in federation.sites.items()
        },
    }


def load_recorded(record: Mapping[str, Any], data_path: Path | None = None) -> Federation:
    """Load the split that a `partition_record` names. Raises DataError if its bytes are others."""
    federation = load_benchmark(
        record["dataset"],
        data_path,
        sites=len(record["sites"]),
        alpha=record["alpha"],
        seed=record["seed"],
        max_train=record["max_train"],
    )
    for name, site in record["sites"].items():
        if name not in federation.sites or _digest(federation.sites[name]) != site["sha256"]:
            raise DataError(
                f"{record['dataset']}: {name} is not as recorded (sha256 {site['sha256'][:12]}...)",
                hint="the data file or the version of numpy or fedimpres is another one",
            )
    return federation


def _load_pools(
    dataset: str, data_path: Path | None, seed: int
) -> tuple[dict[Split, LabelledImages], tuple[str, ...], str]:
    if dataset == "digits":
        everything = _load_digits()
        description = (
            "scikit-learn's digits (UCI optdigits), 8x8 grey; split 60/20/20, stratified, by the seed"
        )
        return _redraw(everything, derive_seed(seed, "digits")), tuple(str(n) for n in range(10)), description
    if dataset == "bloodmnist":
        path = _existing(dataset, data_path)
        return _load_npz(path, seed, BLOOD_CLASSES), BLOOD_CLASSES, _describe_blood(path)
    if dataset.endswith(".npz"):
        path = _existing(dataset, Path(dataset))
        pools = _load_npz(path, seed, None)
        classes = 1 + max(int(pool.labels.max(initial=0)) for pool in pools.values())
        return pools, tuple(str(n) for n in range(classes)), f"{path.name}"
    raise DataError(
        f"unknown benchmark '{dataset}', known: {', '.join(BENCHMARK_NAMES)}, or the path of an npz"
    )


def _existing(dataset: str, path: Path | None) -> Path:
    hint = "give --data PATH: an npz with MedMNIST's keys"
    if dataset == "bloodmnist":
        hint += ", bloodmnist.npz from medmnist.com or the rebuilt one in shared/data"
    if dataset == "wbc_multisite":
        hint = "give --data PATH: an npz with SITE_{train,test}_{images,labels}, as in shared/data"
    if path is None:
        raise DataError(f"{dataset}: no data file given", hint=hint)
    if not path.is_file():
        raise DataError(f"{dataset}: {path}: no such file", hint=hint)
    return path


def _load_digits() -> LabelledImages:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    # Ink is 0..16.
    pixels = np.rint(images.reshape(-1, 8, 8, 1) * (255.0 / 16.0)).astype(np.uint8)
    return LabelledImages(pixels, labels.astype(np.int64))


def _load_npz(path: Path, seed: int, names: tuple[str, ...] | None) -> dict[Split, LabelledImages]:
    with open_npz(path) as file:
        pools = {
            split: _labelled(file, key, path, names)
            for split, key in FILE_KEYS.items()
            if split == "train" or f"{key}_images" in file
        }
    if len(pools) < 3:
        lacking: set[Split] = {split for split in SPLITS if split not in pools}
        cut = cut_held_out_by(
            pools["train"].labels.tolist(),
            validation_fraction=0.2 if "validation" in lacking else 0.0,
            test_fraction=0.2 if "test" in lacking else 0.0,
            seed=derive_seed(seed, "benchmark split"),
        )
        whole = pools["train"]
        pools |= {
            split: whole.take(indices) for split, indices in cut.items() if split in {"train", *lacking}
        }
    return pools


def _real_sites(path: Path, sites: int | None, seed: int, max_train: int | None) -> Federation:
    if sites not in (None, len(WBC_SITES)):
        raise DataError(
            f"wbc_multisite has {len(WBC_SITES)} real sites, got sites = {sites}", hint="leave it out"
        )
    if max_train is not None:
        raise DataError("wbc_multisite: max_train is not for real sites, they are small")
    with open_npz(path) as file:
        splits = {name: _real_site(file, path, name, seed) for name in WBC_SITES}
    shape = splits["pbc"].train.images.shape
    return Federation(
        dataset="wbc_multisite",
        sites=splits,
        class_names=WBC_CLASSES,
        input=(shape[3], shape[1], shape[2]),
        pooled_test=LabelledImages(
            np.concatenate([split.test.images for split in splits.values()]),
            np.concatenate([split.test.labels for split in splits.values()]),
        ),
        description="white blood cells of four real sites, basophils left out; each site's images pooled and "
        f"redrawn 60/20/20, stratified, by the seed; pbc cut to {WBC_MOST['train']} training images",
        method="real sites",
        alpha=None,
        seed=seed,
    )


def _real_site(file: NpzFile, path: Path, name: str, seed: int) -> SiteSplit:
    stored = (*WBC_CLASSES, "basophil")
    parts = [_labelled(file, f"{name}_{half}", path, stored) for half in ("train", "test")]
    images = np.concatenate([part.images for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    kept = np.flatnonzero(labels < len(WBC_CLASSES))
    drawn = _redraw(LabelledImages(images[kept], labels[kept]), derive_seed(seed, "wbc", name))
    rng = np.random.default_rng(derive_seed(seed, "wbc sample", name))
    for split, most in WBC_MOST.items():
        if len(drawn[split]) > most:
            drawn[split] = drawn[split].take(stratified_sample(drawn[split].labels, most, rng))
    return SiteSplit(drawn["train"], drawn["validation"], drawn["test"])


def _deal(labels: LabelArray, count: int, alpha: float | None, seed: int) -> list[IndexArray]:
    draw = derive_seed(seed, "benchmark deal")
    if alpha is None:
        return partition.iid(labels, count, seed=draw)
    return partition.dirichlet(labels, count, alpha, seed=draw)


def _redraw(images: LabelledImages, seed: int) -> dict[Split, LabelledImages]:
    cut = cut_held_out_by(images.labels.tolist(), validation_fraction=0.2, test_fraction=0.2, seed=seed)
    return {split: images.take(indices) for split, indices in cut.items()}


def _labelled(file: NpzFile, key: str, path: Path, names: tuple[str, ...] | None) -> LabelledImages:
    stored = read_array(file, f"{key}_images", path)
    numbers = read_array(file, f"{key}_labels", path)
    who = f"{path}: {key}"
    if stored.ndim not in (3, 4):
        raise DataError(f"{who}: images have shape {list(stored.shape)}, expected [N, H, W] or [N, H, W, C]")
    channels = stored.shape[3] if stored.ndim == 4 else 1
    images: ImageArray
    images, good = convert_array(stored, (channels, stored.shape[1], stored.shape[2]), who=who)
    labels = check_label_array(numbers, len(images), who)
    if not good.all():
        raise DataError(f"{who}: {int((~good).sum())} images hold NaN or values out of range")
    highest = len(names) - 1 if names else 9_999
    if labels.dtype.kind == "U" or labels.min(initial=0) < 0 or labels.max(initial=0) > highest:
        raise DataError(f"{who}: labels must be numbers from 0 to {highest}")
    return LabelledImages(images, labels.astype(np.int64))


def _describe_blood(path: Path) -> str:
    with path.open("rb") as file:
        rebuilt = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return "rebuilt BloodMNIST, own split" if rebuilt == REBUILT_BLOOD_MD5 else f"BloodMNIST ({path.name})"


def _digest(split: SiteSplit) -> str:
    digest = hashlib.sha256()
    for part in (split.train, split.validation, split.test):
        digest.update(repr(part.images.shape).encode())
        digest.update(np.ascontiguousarray(part.images).data)
        digest.update(part.labels.astype("<i8").tobytes())
    return digest.hexdigest()
