"""partition.json: which image of a data set which site holds, so that a split can be had again bit for bit.

Indices count a data set's images in the order in which its file holds them (`benchmark_sources`), so they need
neither the seed nor the algorithm that dealt them. The SHA-256 of every site's pixels and labels says whether what
comes back is what was saved.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcore.data.dataset import Split
from fedcore.errors import DataError
from fedcore.parsing import parse_json

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Index = Annotated[int, Field(ge=0, le=2**40)]
Seed = Annotated[int, Field(ge=0)]
_MODEL = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


class SavedShift(BaseModel):
    """A site's feature shift, as `fedcore.data.feature_shift.Shift`."""

    model_config = _MODEL

    stain: list[float]
    brightness: float
    blur_px: Annotated[float, Field(ge=0, le=100)]
    noise: Annotated[float, Field(ge=0)]
    seed: Seed


class SavedSite(BaseModel):
    """One site: the digest of all its images and labels, and which images these are (None in older records)."""

    model_config = _MODEL

    sha256: Sha256
    indices: dict[Split, list[Index]] | None = None
    shift: SavedShift | None = None


class SavedPartition(BaseModel):
    """What `partition_record` wrote, as far as it takes to load the split again."""

    model_config = _MODEL

    dataset: str
    seed: Seed
    alpha: float | None = None
    max_train: int | None = None
    # A scheme's text; "" in older records.
    partition: str = ""
    data_sha256: Sha256 | None = None
    sites: Annotated[dict[str, SavedSite], Field(min_length=1)]


def check_record(record: object, who: str) -> SavedPartition:
    """The record of a split, checked. Raises DataError that names the first wrong entry."""
    try:
        saved = SavedPartition.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise DataError(
            f"{who}: {place}: {first['msg'].lower()}",
            hint="the record of a split is damaged; use a whole one",
        ) from error
    lacking = [name for name, site in saved.sites.items() if site.indices is None]
    if lacking and len(lacking) < len(saved.sites):
        raise DataError(f"{who}: sites.{lacking[0]}.indices: missing", hint="the record is damaged")
    for name, site in saved.sites.items():
        for split in ("train", "validation", "test"):
            if site.indices is not None and split not in site.indices:
                raise DataError(f"{who}: sites.{name}.indices.{split}: missing", hint="the record is damaged")
    return saved


def read_record(path: Path) -> dict[str, Any]:
    """The record of a file, as `partition_text` writes it. Raises DataError if it is not there or damaged."""
    try:
        record = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: can't be read: {error.strerror}", hint="partition.json lies in the folder of a run"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{path}: damaged, it is not JSON: {error}", hint="use a whole one: partition.json of a run"
        ) from error
    check_record(record, str(path))
    found: dict[str, Any] = record
    return found


def partition_text(record: Mapping[str, Any]) -> str:
    """A record as JSON text, a line an entry and a line a site: indices stay off the screen's height."""
    entries = {key: json.dumps(value) for key, value in record.items() if key != "sites"}
    lines = ",\n".join(
        f"    {json.dumps(name)}: {json.dumps(site)}" for name, site in record["sites"].items()
    )
    entries["sites"] = f"{{\n{lines}\n  }}"
    body = ",\n".join(f"  {json.dumps(key)}: {text}" for key, text in entries.items())
    return f"{{\n{body}\n}}\n"


def split_name(record: Mapping[str, Any]) -> str:
    """8 hexadecimal digits that name a record's split: which site holds which pixels and labels."""
    sites = {name: site["sha256"] for name, site in record["sites"].items()}
    return hashlib.sha256(json.dumps(sites, sort_keys=True).encode()).hexdigest()[:8]
