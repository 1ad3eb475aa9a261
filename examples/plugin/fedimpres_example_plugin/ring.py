"""The dataset `ring`: drawn discs and rings, in place of a reader for your own files or database.

Options: `images` (200), `seed` (0).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedcore.data import DatasetReader, DatasetSettings, DatasetSummary, LabelledImages, SiteData
from fedcore.data.dataset import IndexArray, Split
from fedcore.data.images import convert_array
from fedcore.data.labels import labels_from_names
from fedcore.data.splits import cut_held_out
from fedcore.plan import Plan

CLASS_NAMES = ("disc", "ring")
SIDE = 32


@dataclass(frozen=True)
class RingReader:
    """Draws `count` grey images, half of them with a hole in the middle."""

    count: int
    seed: int
    settings: DatasetSettings

    def summarise(self) -> DatasetSummary:
        """Count the training images, without drawing any."""
        return DatasetSummary(len(self._cut()["train"]), CLASS_NAMES)

    def read(self, plan: Plan) -> SiteData:
        """Draw all images, convert them to the plan's input, map the labels by name and cut the splits."""
        stored = np.stack([_draw(n % 2 == 1, n, self.seed) for n in range(self.count)])
        images, _ = convert_array(stored, plan.model.input, who="ring")
        everything = LabelledImages(images, labels_from_names(self._names(), plan, "ring"))
        parts = {split: everything.take(indices) for split, indices in self._cut().items()}
        return SiteData(parts["train"], parts["validation"], parts["test"], plan.class_names)

    def _names(self) -> list[str]:
        return [CLASS_NAMES[n % 2] for n in range(self.count)]

    def _cut(self) -> Mapping[Split, IndexArray]:
        return cut_held_out(
            self._names(),
            validation_fraction=self.settings.validation_fraction,
            test_fraction=self.settings.test_fraction,
        )


def open_reader(settings: DatasetSettings) -> DatasetReader:
    """The reader for these settings. Raises ConfigError if an option is unknown or of another type."""
    options = settings.read_options({"images": 200, "seed": 0})
    count, seed = options["images"], options["seed"]
    assert isinstance(count, int)
    assert isinstance(seed, int)
    return RingReader(count, seed, settings)


def _draw(hole: bool, number: int, seed: int) -> np.ndarray:
    """A uint8 image [SIDE, SIDE]: place and size drawn by the seed, noise on top."""
    rng = np.random.default_rng([seed, number])
    radius = rng.uniform(0.2, 0.35) * SIDE
    y, x = np.mgrid[:SIDE, :SIDE] - rng.uniform(0.4, 0.6, (2, 1, 1)) * SIDE
    distance = np.hypot(y, x)
    shape = (distance < radius) & (distance > (radius / 2 if hole else -1.0))
    noise = rng.integers(0, 40, (SIDE, SIDE))
    return np.asarray(shape * 200 + noise, dtype=np.uint8)
