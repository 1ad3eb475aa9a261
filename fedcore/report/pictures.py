"""Impressions as pictures: read from their artifact, shown as PNGs within the page.

Legend: M impressions, C channels, H height, W width.
"""

import base64
import io
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import StorageError
from fedcore.tensor_file import read_manifest

MAX_PER_CLASS = 24
_TENSORS: tuple[tuple[str, str, type[np.generic], int], ...] = (
    ("images", "U8", np.uint8, 4), ("labels", "I64", np.int64, 1), ("born", "I64", np.int64, 1),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pictures:
    """The impressions made after a round: uint8 [M, C, H, W] as pixels, int64 [M] as classes.

    `born`, int64 [M], is the round in which each was begun; None where that is not known.
    """

    round: int
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    born: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"round {self.round}: impressions are {self.images.dtype} {list(self.images.shape)}, "
                "expected uint8 [M, C, H, W]"
            )
        if self.labels.shape != (len(self.images),):
            raise ValueError(
                f"round {self.round}: {len(self.labels)} labels for {len(self.images)} impressions"
            )
        if self.born is not None and self.born.shape != self.labels.shape:
            raise ValueError(
                f"round {self.round}: {self.born.size} rounds of birth for {len(self.images)} impressions"
            )


def read_pictures(path: Path, round_: int) -> Pictures:
    """Read an impressions artifact (tensors `images`, `labels` and, if it is there, `born`). Raises StorageError."""
    manifest, start = read_manifest(path)
    specs = {spec.name: spec for spec in manifest.tensors}
    offsets = manifest.offsets()
    arrays: dict[str, NDArray[Any]] = {}
    with path.open("rb") as file:
        for name, dtype, kind, ndim in _TENSORS:
            spec = specs.get(name)
            if spec is None and name == "born":
                continue
            if spec is None or spec.dtype != dtype or len(spec.shape) != ndim:
                got = "nothing" if spec is None else f"{spec.dtype} {list(spec.shape)}"
                raise StorageError(f"{path}: tensor '{name}' is {got}, expected {dtype} of {ndim} dimensions")
            file.seek(start + offsets[name][0])
            arrays[name] = np.frombuffer(file.read(spec.size_bytes), kind).reshape(spec.shape)
    try:
        return Pictures(round_, arrays["images"], arrays["labels"], arrays.get("born"))
    except ValueError as error:
        raise StorageError(f"{path}: {error}") from error


def png_data_uri(image: NDArray[np.uint8]) -> str:
    """An image [C, H, W] as a data URI: 3 channels as colours, of any other number the first in grey."""
    from PIL import Image

    pixels = np.ascontiguousarray(image.transpose(1, 2, 0) if len(image) == 3 else image[0])
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def picture_rows(pictures: Pictures, class_names: tuple[str, ...], per_class: int = MAX_PER_CLASS) -> str:
    """HTML: a row of pictures for each class that has any, at most `per_class`, with the class's name and
    count.
    """
    rows = []
    for label in sorted({int(label) for label in pictures.labels}):
        name = class_names[label] if 0 <= label < len(class_names) else str(label)
        chosen = np.flatnonzero(pictures.labels == label)
        images = "".join(
            f'<img src="{png_data_uri(pictures.images[i])}" alt="impression of {escape(name)}">'
            for i in chosen[:per_class]
        )
        more = f", {per_class} shown" if len(chosen) > per_class else ""
        rows.append(
            f'<div class="class"><div class="label">{escape(name)}<small>{len(chosen)}{more}</small></div>'
            f'<div class="pics">{images}</div></div>'
        )
    return f'<div class="classes">{"".join(rows)}</div>'
