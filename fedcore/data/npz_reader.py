"""npz files with MedMNIST's keys: {train,val,test}_{images,labels}; val and test may be missing.

Images [N, H, W] or [N, H, W, C], uint8, uint16 or floats in [0, 1]; labels [N] or [N, 1], numbers or names.
An array is read when it is needed, and one split is converted before the next one is read. Nothing is
unpickled.

Option: `max_value`, the stored value that means full intensity (4095 for 12-bit images, say).
"""

import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from fedcore.data.corruption import CorruptionTally
from fedcore.data.dataset import (
    SPLITS,
    DatasetSettings,
    DatasetSummary,
    IndexArray,
    LabelledImages,
    SiteData,
    Split,
)
from fedcore.data.images import convert_array
from fedcore.data.labels import check_label_array, labels_from_names, labels_from_numbers
from fedcore.data.splits import cut_held_out
from fedcore.errors import DataError
from fedcore.plan import Plan

FILE_KEYS: Mapping[Split, str] = {"train": "train", "validation": "val", "test": "test"}
# Numpy writes no other. Of one byte, deflate makes at most so many.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DEFLATE_FACTOR = 1032
_HEADER_READERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclass(frozen=True, slots=True)
class NpzReader:
    """Reads one npz file."""

    path: Path
    settings: DatasetSettings
    max_value: float | None
    # Whether a plan without class names takes the file's numbers as they are, though the site has names for
    # them.
    numbers_are_standard: bool = False

    def summarise(self) -> DatasetSummary:
        """Read the labels only. Raises DataError."""
        with open_npz(self.path) as file:
            labels = self._labels(file, "train")
            cut = self._cut(file, labels)
        return DatasetSummary(len(labels) if cut is None else len(cut["train"]), self.settings.class_names)

    def read(self, plan: Plan) -> SiteData:
        """Read all splits. Raises DataError, CorruptImagesError, PlanError."""
        tally = CorruptionTally(str(self.path))
        total = 0
        splits: dict[Split, LabelledImages] = {}
        with open_npz(self.path) as file:
            cut = self._cut(file, self._labels(file, "train"))
            for split in SPLITS:
                if split == "train" or f"{FILE_KEYS[split]}_images" in file:
                    splits[split], good = self.read_split(file, split, plan, tally)
                    total += len(good)
                    if split == "train" and cut is not None:
                        whole = splits[split]
                        splits |= {part: whole.take(indices[good[indices]]) for part, indices in cut.items()}
                    elif not good.all():
                        splits[split] = splits[split].take(np.flatnonzero(good))
        corrupt = tally.check(total, plan)
        if len(splits["train"]) == 0:
            raise DataError(f"{self.path}: no training images")
        return SiteData(splits["train"], splits["validation"], splits["test"], plan.class_names, corrupt)

    def read_split(
        self, file: NpzFile, split: Split, plan: Plan, tally: CorruptionTally
    ) -> tuple[LabelledImages, NDArray[np.bool_]]:
        """One split as it is stored, bad images included and counted, and which ones are good."""
        who = f"{self.path}: {FILE_KEYS[split]}"
        stored = self._labels(file, split)
        if stored.dtype.kind == "U":
            labels = labels_from_names([str(name) for name in stored], plan, who)
        else:
            names = self.settings.class_names
            if self.numbers_are_standard and plan.data.class_names is None:
                names = None
            labels = labels_from_numbers(stored, names, plan, who)
        key = f"{FILE_KEYS[split]}_images"
        images, good = convert_array(
            read_array(file, key, self.path),
            plan.model.input,
            max_value=self.max_value,
            who=f"{self.path}: {key}",
        )
        if len(images) != len(labels):
            raise DataError(f"{who}: {len(images)} images, but {len(labels)} labels")
        for n in np.flatnonzero(~good):
            tally.add(f"{key}[{n}]", "values are NaN or out of range")
        return LabelledImages(images, labels), good

    def _labels(self, file: NpzFile, split: Split) -> NDArray[Any]:
        key = f"{FILE_KEYS[split]}_labels"
        labels = read_array(file, key, self.path)
        return check_label_array(labels, len(labels) if labels.ndim else 0, f"{self.path}: {key}")

    def _cut(self, file: NpzFile, labels: NDArray[Any]) -> Mapping[Split, IndexArray] | None:
        """Which training images become validation and test, where the file lacks these."""
        lacks = {split: f"{FILE_KEYS[split]}_images" not in file for split in SPLITS}
        if not lacks["validation"] and not lacks["test"]:
            return None
        cut = cut_held_out(
            labels.tolist(),
            validation_fraction=self.settings.validation_fraction if lacks["validation"] else 0.0,
            test_fraction=self.settings.test_fraction if lacks["test"] else 0.0,
        )
        return {split: indices for split, indices in cut.items() if split == "train" or lacks[split]}


def open_reader(settings: DatasetSettings) -> NpzReader:
    """The reader for `settings.path`. Raises ConfigError."""
    options = settings.read_options({"max_value": None})
    return NpzReader(settings.required_path(), settings, max_value_of(options["max_value"]))


def read_test_set(path: Path, plan: Plan) -> LabelledImages:
    """The test split of an npz that may hold nothing else; its numbers are in the plan's class order.

    For the coordinator's own test set. Raises DataError, CorruptImagesError.
    """
    with open_npz(path) as file:
        return _split_alone(file, "test", path, plan)


def read_held_out(path: Path, plan: Plan) -> LabelledImages:
    """The validation split of an npz, or the test split if it has no other; as `read_test_set` otherwise."""
    with open_npz(path) as file:
        split: Split = "validation" if f"{FILE_KEYS['validation']}_images" in file else "test"
        return _split_alone(file, split, path, plan)


def _split_alone(file: NpzFile, split: Split, path: Path, plan: Plan) -> LabelledImages:
    reader = NpzReader(path, DatasetSettings("npz", path), None)
    tally = CorruptionTally(str(path))
    images, good = reader.read_split(file, split, plan, tally)
    tally.check(len(good), plan)
    return images if good.all() else images.take(np.flatnonzero(good))


def max_value_of(option: object) -> float | None:
    """The option `max_value` as a number."""
    return float(option) if isinstance(option, int | float) else None


@contextmanager
def open_npz(path: Path) -> Iterator[NpzFile]:
    """An npz file whose arrays are read when they are asked for, by `read_array`. Raises DataError."""
    with ExitStack() as stack:
        try:
            # Opened here because np.load leaves a damaged file open.
            raw = stack.enter_context(path.open("rb"))
            start = raw.read(len(np.lib.format.MAGIC_PREFIX))
        except FileNotFoundError as error:
            raise DataError(f"{path}: no such file", hint="set [data] path in agent.toml") from error
        except OSError as error:
            raise DataError(f"{path}: not a readable npz file: {error}") from error
        if start == np.lib.format.MAGIC_PREFIX:
            raise DataError(f"{path}: holds one array, expected an npz with train_images and train_labels")
        try:
            if not zipfile.is_zipfile(raw):
                raise ValueError("it is no zip archive")
            raw.seek(0)
            file = NpzFile(raw, own_fid=False, allow_pickle=False)
        except Exception as error:  # zipfile, fed with a damaged file, raises whatever it likes
            raise DataError(f"{path}: not a readable npz file: {error}") from error
        yield stack.enter_context(file)


def read_array(file: NpzFile, key: str, path: Path) -> NDArray[Any]:
    """One array of an npz file. Raises DataError if it is not there, damaged or pickled."""
    if key not in file:
        raise DataError(f"{path}: has no array '{key}', only: {', '.join(sorted(file)) or 'none'}")
    try:
        _check_declared(file, key)
        array: NDArray[Any] = file[key]
    except Exception as error:  # zipfile and numpy, fed with a damaged file, raise whatever they like
        raise DataError(f"{path}: '{key}' can't be read: {error}") from error
    return array


def _check_declared(file: NpzFile, key: str) -> None:
    """Raise ValueError if an array declares more than is there: numpy allocates what is declared before it reads."""
    archive = file.zip
    assert archive is not None, "closed while it is read"
    member = archive.getinfo(key if key in archive.namelist() else f"{key}.npy")
    if member.compress_type not in _METHODS:
        raise ValueError(f"compressed by method {member.compress_type}, expected none or deflate")
    most = member.compress_size * (_DEFLATE_FACTOR if member.compress_type == zipfile.ZIP_DEFLATED else 1)
    with archive.open(member) as stored:
        read_header = _HEADER_READERS.get(np.lib.format.read_magic(stored))
        if read_header is None:
            raise ValueError("not an array of numbers or text")
        shape, _, dtype = read_header(stored)
        declared = stored.tell() + math.prod(shape) * dtype.itemsize
    if declared > min(member.file_size, most):
        raise ValueError(f"declares {declared} bytes, holds {min(member.file_size, most)}")
