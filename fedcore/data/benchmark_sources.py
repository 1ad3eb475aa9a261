"""Data sets as their files hold them: all images in one fixed order, and how a seed cuts them into splits.

The order is what saved indices count: scikit-learn's for digits; train, val, test as stored for an npz; site after
site, each train then test, for wbc_multisite. No torch.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile

from fedcore.data.dataset import SPLITS, ImageArray, IndexArray, LabelledImages, Split
from fedcore.data.images import convert_array
from fedcore.data.labels import check_label_array
from fedcore.data.npz_reader import FILE_KEYS, open_npz, read_array
from fedcore.data.splits import cut_held_out_by, stratified_sample
from fedcore.errors import DataError
from fedcore.seeding import derive_seed

BENCHMARK_NAMES = ("digits", "bloodmnist", "wbc_multisite")
REAL_SITES = "wbc_multisite"
BLOOD_CLASSES = (
    "basophil", "eosinophil", "erythroblast", "immature granulocyte", "lymphocyte", "monocyte", "neutrophil",
    "platelet",
)  # fmt: skip
WBC_SITES = ("pbc", "tecom", "cellavision", "bccd")
# The file's class 4, basophil, is left out: it hardly occurs outside pbc.
WBC_CLASSES = ("neutrophil", "lymphocyte", "monocyte", "eosinophil")
# pbc is a hundred times larger than cellavision; cut, the sites weigh alike.
WBC_MOST: Mapping[Split, int] = {"train": 300, "validation": 100, "test": 150}
REBUILT_BLOOD_MD5 = "2a6c54369dbe8819f9b2ee4ad840425d"
# Of the images of a set that stores no validation or test split.
HELD_OUT_FRACTION = 0.2

Cut = Mapping[Split, IndexArray]


@dataclass(frozen=True)
class Source:
    """All images of a data set. Arrays of indices count them; every one of them is sorted.

    `stored` holds the splits that the file has, `purpose` seeds the cut of those that it lacks. `sites` holds each
    real site's images, where the file tells; `redrawn` says that they are cut anew by the seed, whatever is stored.
    """

    dataset: str
    images: LabelledImages
    class_names: tuple[str, ...]
    description: str
    stored: Cut
    purpose: str = "benchmark split"
    sites: Mapping[str, IndexArray] | None = None
    redrawn: bool = False

    @cached_property
    def sha256(self) -> str:
        """Digest of all pixels and labels: what saved indices belong to."""
        return images_digest([self.images])

    def pools(self, seed: int) -> Cut:
        """The splits: as stored, what lacks cut from the training images, stratified by class."""
        return self._cut(self.stored, derive_seed(seed, self.purpose))

    def site_pools(self, seed: int) -> dict[str, Cut]:
        """The splits of each real site. Raises DataError if the file tells none."""
        if self.sites is None:
            hint = "by_site is for wbc_multisite, or an npz with {train,val,test}_sites, a name or number an image"
            raise DataError(f"{self.dataset}: the file does not tell the images' sites", hint=hint)
        return {name: self._site(name, members, seed) for name, members in self.sites.items()}

    def _site(self, name: str, members: IndexArray, seed: int) -> Cut:
        if not self.redrawn:
            own = {split: np.intersect1d(indices, members) for split, indices in self.stored.items()}
            return self._cut(own, derive_seed(seed, self.purpose, name))
        drawn = dict(self._cut({"train": members}, derive_seed(seed, "wbc", name)))
        rng = np.random.default_rng(derive_seed(seed, "wbc sample", name))
        for split, most in WBC_MOST.items():
            if len(drawn[split]) > most:
                drawn[split] = drawn[split][stratified_sample(self.images.labels[drawn[split]], most, rng)]
        return drawn

    def _cut(self, stored: Cut, seed: int) -> Cut:
        lacking: set[Split] = {split for split in SPLITS if split not in stored}
        if not lacking:
            return stored
        cut = cut_held_out_by(
            self.images.labels[stored["train"]].tolist(),
            validation_fraction=HELD_OUT_FRACTION if "validation" in lacking else 0.0,
            test_fraction=HELD_OUT_FRACTION if "test" in lacking else 0.0,
            seed=seed,
        )
        return {**stored, **{split: stored["train"][cut[split]] for split in {"train", *lacking}}}


def read_source(dataset: str, data_path: Path | None) -> Source:
    """Read a data set by name, or an npz by its path. Raises DataError that says how to get it."""
    if dataset == "digits":
        return _read_digits()
    if dataset == REAL_SITES:
        return _read_wbc(_existing(dataset, data_path))
    if dataset == "bloodmnist":
        path = _existing(dataset, data_path)
        return _read_npz(dataset, path, BLOOD_CLASSES, _describe_blood(path))
    if dataset.endswith(".npz"):
        path = _existing(dataset, Path(dataset))
        return _read_npz(dataset, path, None, path.name)
    raise DataError(
        f"unknown benchmark '{dataset}', known: {', '.join(BENCHMARK_NAMES)}, or the path of an npz"
    )


def images_digest(parts: Iterable[LabelledImages]) -> str:
    """SHA-256 of the shapes, pixels and labels of some sets, one after another."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part.images.shape).encode())
        digest.update(np.ascontiguousarray(part.images).data)
        digest.update(part.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _existing(dataset: str, path: Path | None) -> Path:
    hint = "give --data PATH: an npz with MedMNIST's keys"
    if dataset == "bloodmnist":
        hint += ", bloodmnist.npz from medmnist.com or the rebuilt one in shared/data"
    if dataset == REAL_SITES:
        hint = "give --data PATH: an npz with SITE_{train,test}_{images,labels}, as in shared/data"
    if path is None:
        raise DataError(f"{dataset}: no data file given", hint=hint)
    if not path.is_file():
        raise DataError(f"{dataset}: {path}: no such file", hint=hint)
    return path


def _read_digits() -> Source:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    # Ink is 0..16.
    pixels = np.rint(images.reshape(-1, 8, 8, 1) * (255.0 / 16.0)).astype(np.uint8)
    return Source(
        dataset="digits",
        images=LabelledImages(pixels, labels.astype(np.int64)),
        class_names=tuple(str(n) for n in range(10)),
        description="scikit-learn's digits (UCI optdigits), 8x8 grey; split 60/20/20, stratified, by the seed",
        stored={"train": np.arange(len(labels), dtype=np.int64)},
        purpose="digits",
    )


def _read_npz(dataset: str, path: Path, names: tuple[str, ...] | None, description: str) -> Source:
    with open_npz(path) as file:
        splits: list[Split] = [s for s in SPLITS if s == "train" or f"{FILE_KEYS[s]}_images" in file]
        parts = [_labelled(file, FILE_KEYS[split], path, names) for split in splits]
        owners = _owners(file, path, splits, parts)
    images, ranges = _joined(parts, path)
    classes = 1 + int(images.labels.max(initial=0))
    return Source(
        dataset=dataset,
        images=images,
        class_names=names if names is not None else tuple(str(n) for n in range(classes)),
        description=description,
        stored=dict(zip(splits, ranges, strict=True)),
        sites=owners,
    )


def _owners(
    file: NpzFile, path: Path, splits: list[Split], parts: list[LabelledImages]
) -> dict[str, IndexArray] | None:
    """Each real site's images, from {train,val,test}_sites: [N] or [N, 1], names, or numbers n for "site-n"."""
    if "train_sites" not in file:
        return None
    named: list[str] = []
    for split, part in zip(splits, parts, strict=True):
        key = f"{FILE_KEYS[split]}_sites"
        stored = read_array(file, key, path).reshape(-1)
        if len(stored) != len(part) or stored.dtype.kind not in "Uiu":
            raise DataError(
                f"{path}: {key}: {len(stored)} entries of {stored.dtype}, "
                f"expected a name or a whole number for each of {len(part)} images"
            )
        named += [str(entry) if stored.dtype.kind == "U" else f"site-{entry}" for entry in stored.tolist()]
    everyone = np.array(named)
    return {name: np.flatnonzero(everyone == name) for name in sorted(set(named))}


def _read_wbc(path: Path) -> Source:
    stored = (*WBC_CLASSES, "basophil")
    with open_npz(path) as file:
        halves = [
            _labelled(file, f"{name}_{half}", path, stored)
            for name in WBC_SITES
            for half in ("train", "test")
        ]
    images, ranges = _joined(halves, path)
    kept = images.labels < len(WBC_CLASSES)
    return Source(
        dataset=REAL_SITES,
        images=images,
        class_names=WBC_CLASSES,
        description="white blood cells of four real sites, basophils left out; each site's images pooled and "
        f"redrawn 60/20/20, stratified, by the seed; pbc cut to {WBC_MOST['train']} training images",
        stored={},
        sites={
            name: members[kept[members]]
            for n, name in enumerate(WBC_SITES)
            for members in [np.concatenate(ranges[2 * n : 2 * n + 2])]
        },
        redrawn=True,
    )


def _joined(parts: list[LabelledImages], path: Path) -> tuple[LabelledImages, list[IndexArray]]:
    """All parts as one, and where each lies in it."""
    shapes = {part.images.shape[1:] for part in parts}
    if len(shapes) > 1:
        listed = ", ".join(str(list(shape)) for shape in sorted(shapes))
        raise DataError(f"{path}: images of different shapes: {listed}, expected one")
    ends = np.cumsum([len(part) for part in parts]).tolist()
    ranges = [np.arange(end - len(part), end, dtype=np.int64) for part, end in zip(parts, ends, strict=True)]
    images = np.concatenate([part.images for part in parts])
    return LabelledImages(images, np.concatenate([part.labels for part in parts])), ranges


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
