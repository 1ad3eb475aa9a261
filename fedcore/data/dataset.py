"""What a site's data is, whatever it was read from: splits of labelled images, and the readers' protocol."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import ConfigError
from fedcore.plan import Options, Plan, Scalar

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
# What the splits are called in files and folders.
SPLIT_ALIASES: Mapping[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}

ImageArray = NDArray[np.uint8]
LabelArray = NDArray[np.int64]
IndexArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """`images` uint8 [N, H, W, C] as pixels, `labels` int64 [N] in the plan's class order."""

    images: ImageArray
    labels: LabelArray

    def __post_init__(self) -> None:
        assert self.images.ndim == 4
        assert self.images.dtype == np.uint8
        assert self.labels.dtype == np.int64
        assert self.labels.shape == self.images.shape[:1]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: IndexArray) -> "LabelledImages":
        """The images and labels at these indices, copied."""
        return LabelledImages(self.images[indices], self.labels[indices])


@dataclass(frozen=True, slots=True)
class SiteData:
    """A site's splits (all but `train` may be empty), the plan's class names, the images skipped."""

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    class_names: tuple[str, ...]
    corrupt_images: int = 0


@dataclass(frozen=True, slots=True)
class DatasetSummary:
    """Training images as listed, unreadable ones included; the site's class names where known."""

    num_examples: int
    class_names: tuple[str, ...] | None


class DatasetReader(Protocol):
    """Reads one site's data. Opening a reader touches nothing; both methods may raise DataError."""

    def summarise(self) -> DatasetSummary:
        """Count the training images and name the classes, without decoding images."""

    def read(self, plan: Plan) -> SiteData:
        """Read all images, converted to the plan's size and class order.

        Raises DataError (CorruptImagesError above the plan's budget), PlanError if the plan lacks what this
        data needs.
        """


@dataclass(frozen=True, slots=True)
class DatasetSettings:
    """The `[data]` section of agent.toml, as a reader gets it; the fractions are shares of all images."""

    kind: str
    path: Path | None
    class_names: tuple[str, ...] | None = None
    allow_download: bool = False
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    options: Options = field(default_factory=dict)

    def required_path(self) -> Path:
        """The path. Raises ConfigError if it is not set."""
        if self.path is None:
            raise ConfigError(f"data.path is not set, kind '{self.kind}' needs it")
        return self.path

    def read_options(self, defaults: Mapping[str, Scalar | None]) -> dict[str, Scalar | None]:
        """The options with defaults filled in; a default of None may be any number.

        Raises ConfigError that names an unknown option, or one whose value is of another type than its
        default.
        """
        for name, value in self.options.items():
            if name not in defaults:
                known = ", ".join(sorted(defaults)) or "none"
                raise ConfigError(f"data.options: kind '{self.kind}' has no option '{name}', known: {known}")
            default = defaults[name]
            expected = (int, float) if default is None else (type(default),)
            if not isinstance(value, expected) or (isinstance(value, bool) and not isinstance(default, bool)):
                wanted = " or ".join(kind.__name__ for kind in expected)
                raise ConfigError(f"data.options.{name}: expected {wanted}, got {value!r}")
        return {**defaults, **cast(dict[str, Scalar], self.options)}
