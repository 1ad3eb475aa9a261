"""The demo's data: a benchmark dealt over sites, one npz file each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedctl.demo_federation import DemoSite

if TYPE_CHECKING:
    from fedcore.data.benchmark_sets import Federation


@dataclass(frozen=True, slots=True)
class DemoData:
    """Sites with their files, and what the plan and the report need to know of the data.

    `image_shape` is (channels, height, width); `holdings` is training images of each class at each site.
    `coordinator` is a file of validation images of all sites, None if there are none: what a coordinator that has
    public images would measure local training on.
    """

    sites: tuple[DemoSite, ...]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    holdings: Mapping[str, Mapping[str, int]]
    description: str
    split: str
    coordinator: Path | None


def prepare_data(
    dataset: str, data: Path | None, *, sites: int | None, alpha: float, seed: int, folder: Path, record: Path
) -> DemoData:
    """Deal a benchmark over sites, write each site's npz and the coordinator's into `folder`, and what gives the
    split again to `record`.

    Raises DataError if the data is not there or can't be dealt so.
    """
    from fedcore.data.benchmark_sets import load_benchmark, partition_record, write_site
    from fedcore.data.saved_partition import partition_text

    federation = load_benchmark(dataset, data, sites=sites, alpha=alpha, seed=seed)
    folder.mkdir()
    dealt = []
    for name, split in federation.sites.items():
        path = folder / f"{name}.npz"
        write_site(split, path)
        dealt.append(DemoSite(name, path))
    coordinator = folder / "coordinator.npz"
    has_images = _write_validation(federation, coordinator)
    document = partition_record(federation)
    record.write_text(partition_text(document), encoding="utf-8")
    holdings = {
        name: dict(zip(federation.class_names, site["class_counts"], strict=True))
        for name, site in document["sites"].items()
    }
    method = "real sites" if federation.alpha is None else f"Dirichlet by label, alpha {federation.alpha:g}"
    return DemoData(
        tuple(dealt),
        federation.class_names,
        federation.input,
        holdings,
        federation.description,
        method,
        coordinator if has_images else None,
    )


def _write_validation(federation: "Federation", path: Path) -> bool:
    """Write the sites' validation images, pooled, as an npz with MedMNIST's keys; False if there are none.

    Never their test images: nothing but the final figures may come from those.
    """
    import numpy as np

    splits = [split.validation for split in federation.sites.values()]
    if not any(len(split) for split in splits):
        return False
    images = np.concatenate([split.images for split in splits])
    labels = np.concatenate([split.labels for split in splits])
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, val_images=images, val_labels=labels[:, np.newaxis])
    return True
