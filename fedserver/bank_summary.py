"""What a bank of impressions is made of, read from its file: labels and ages, never a pixel."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedcore.errors import StorageError
from fedcore.tensor_file import read_manifest

_LABELS, _BORN = "labels", "born"


@dataclass(frozen=True, slots=True)
class BankSummary:
    """`size_bytes` on disk; images by class (its number in the plan) and by the round in which they were begun."""

    size_bytes: int
    num_images: int
    classes: Mapping[int, int] = field(default_factory=dict)
    born: Mapping[int, int] = field(default_factory=dict)


def summarise_bank(path: Path) -> BankSummary:
    """Count a bank's images. Raises StorageError if the file is damaged or no bank."""
    manifest, start = read_manifest(path)
    specs = {spec.name: spec for spec in manifest.tensors}
    counts: dict[str, dict[int, int]] = {}
    try:
        with path.open("rb") as file:
            for name in (_LABELS, _BORN):
                spec = specs.get(name)
                if spec is None or spec.dtype != "I64" or len(spec.shape) != 1:
                    if name == _BORN:
                        continue
                    raise StorageError(f"{path}: not a bank of impressions, it holds {sorted(specs)[:6]}")
                file.seek(start + manifest.offsets()[name][0])
                values = np.frombuffer(file.read(spec.size_bytes), np.int64)
                counts[name] = dict(sorted(Counter(values.tolist()).items()))
        size_bytes = path.stat().st_size
    except OSError as error:
        raise StorageError(f"{path}: can't be read: {error}") from error
    total = sum(counts[_LABELS].values())
    return BankSummary(size_bytes, total, counts[_LABELS], counts.get(_BORN, {}))
