"""Reading lists of image files: what image folders and CSV tables have in common."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedcore.data.corruption import CorruptionTally
from fedcore.data.dataset import SPLITS, DatasetSettings, DatasetSummary, LabelledImages, SiteData, Split
from fedcore.data.images import UnreadableImageError, decode_file, quiet_decoding
from fedcore.data.labels import labels_from_names, require_class_names
from fedcore.data.splits import cut_held_out
from fedcore.errors import DataError
from fedcore.plan import Plan


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image on disk: `name` is what messages call it."""

    path: Path
    name: str
    label: str
    split: Split


def read_files(
    files: Sequence[ImageFile], settings: DatasetSettings, plan: Plan, max_value: float | None
) -> SiteData:
    """Decode all files, count the unreadable ones, cut the
    splits that the list lacks.

    Splits are cut from the list, before anything is decoded: a file that breaks later moves no other image.
    Raises DataError, CorruptImagesError, PlanError.
    """
    who = str(settings.path)
    require_class_names(plan, who)
    labels_from_names([file.label for file in files], plan, who)
    tally = CorruptionTally(who)
    splits = {
        split: _read_split(part, plan, max_value, tally, who)
        for split, part in divide(files, settings).items()
    }
    corrupt = tally.check(len(files), plan)
    if len(splits["train"]) == 0:
        raise DataError(f"{who}: no training images")
    return SiteData(splits["train"], splits["validation"], splits["test"], plan.class_names, corrupt)


def summarise_files(files: Sequence[ImageFile], settings: DatasetSettings) -> DatasetSummary:
    """Count the files of the training split, and name the classes that occur, sorted."""
    names = settings.class_names or tuple(sorted({file.label for file in files}))
    return DatasetSummary(len(divide(files, settings)["train"]), names)


def divide(files: Sequence[ImageFile], settings: DatasetSettings) -> Mapping[Split, list[ImageFile]]:
    """Files by split; a split that no file names is cut from the training files."""
    parts: dict[Split, list[ImageFile]] = {split: [f for f in files if f.split == split] for split in SPLITS}
    train = parts["train"]
    cut = cut_held_out(
        [file.label for file in train],
        validation_fraction=0.0 if parts["validation"] else settings.validation_fraction,
        test_fraction=0.0 if parts["test"] else settings.test_fraction,
    )
    for split, indices in cut.items():
        if split == "train" or not parts[split]:
            parts[split] = [train[int(n)] for n in indices]
    return parts


def _read_split(
    files: Sequence[ImageFile], plan: Plan, max_value: float | None, tally: CorruptionTally, who: str
) -> LabelledImages:
    channels, height, width = plan.model.input
    images = np.empty((len(files), height, width, channels), dtype=np.uint8)
    good = np.ones(len(files), dtype=bool)

    def decode(n: int) -> str:
        try:
            images[n] = decode_file(files[n].path, plan.model.input, max_value=max_value)
        except UnreadableImageError as error:
            return str(error)
        return ""

    workers = min(8, os.cpu_count() or 1)
    with quiet_decoding(), ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        for n, problem in enumerate(pool.map(decode, range(len(files)))):
            if problem:
                good[n] = False
                tally.add(files[n].name, problem)
    kept = np.flatnonzero(good)
    labels = labels_from_names([files[int(n)].label for n in kept], plan, who)
    return LabelledImages(images[kept], labels)
