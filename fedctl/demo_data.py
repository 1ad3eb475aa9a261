"""The demo's data: a benchmark dealt over sites, one npz file each."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedctl.demo_federation import DemoSite


@dataclass(frozen=True, slots=True)
class DemoData:
    """Sites with their files, and what the plan and the report need to know of the data.

    `image_shape` is (channels, height, width); `holdings` is training images of each class at each site.
    """

    sites: tuple[DemoSite, ...]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    holdings: Mapping[str, Mapping[str, int]]
    description: str
    split: str


def prepare_data(
    dataset: str, data: Path | None, *, sites: int | None, alpha: float, seed: int, folder: Path, record: Path
) -> DemoData:
    """Deal a benchmark over sites, write each site's npz into `folder` and what gives the split again to
    `record`.

    Raises DataError if the data is not there or can't be dealt so.
    """
    from fedcore.data.benchmark_sets import load_benchmark, partition_record, write_site

    federation = load_benchmark(dataset, data, sites=sites, alpha=alpha, seed=seed)
    folder.mkdir()
    dealt = []
    for name, split in federation.sites.items():
        path = folder / f"{name}.npz"
        write_site(split, path)
        dealt.append(DemoSite(name, path))
    document = partition_record(federation)
    record.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    holdings = {
        name: dict(zip(federation.class_names, site["class_counts"], strict=True))
        for name, site in document["sites"].items()
    }
    method = "real sites" if federation.alpha is None else f"Dirichlet by label, alpha {federation.alpha:g}"
    return DemoData(
        tuple(dealt), federation.class_names, federation.input, holdings, federation.description, method
    )
