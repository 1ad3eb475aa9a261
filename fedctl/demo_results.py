"""What a demo leaves in its folder: rounds, model, impressions, report."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedcore.errors import NotFoundError, StorageError
from fedctl.admin import Admin, list_records
from fedctl.model_commands import choose_model, fetch_model, list_models
from fedctl.transfer import download_artifact

if TYPE_CHECKING:
    from fedcore.report.pictures import Pictures
    from fedcore.v1 import admin_pb2


# As many as stand side by side in the report.
PICTURED_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Collected:
    """What came back from the coordinator."""

    records: list[dict[str, Any]]
    pictures: list["Pictures"]


def collect(admin: Admin, run: str, out: Path, work: Path) -> Collected:
    """Write rounds.jsonl, model.safetensors with its card, and impressions.safetensors where some were made.

    The model is that of the last round, which the final figures speak of. Raises what the coordinator
    answers.
    """
    records = list_records(admin, run)
    write_lines(out / "rounds.jsonl", records)
    if not records:
        return Collected([], [])
    models = list_models(admin, run)
    fetch_model(admin, choose_model(models, run, "last"), out / "model.safetensors")
    return Collected(records, _fetch_pictures(admin, models, out / "impressions.safetensors", work))


def final_figures(record: Mapping[str, Any] | None) -> dict[str, float | None]:
    """The figures of the last round; None where there are none."""
    from fedcore.report.page import worst_site

    if record is None:
        return {"accuracy": None, "balanced_accuracy": None, "worst_site_accuracy": None}
    worst = worst_site(record)
    return {
        "accuracy": record.get("accuracy"),
        "balanced_accuracy": record.get("balanced_accuracy"),
        "worst_site_accuracy": worst[1] if worst else None,
    }


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines. Raises StorageError."""
    try:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{path}: can't be written: {error}") from error


def _fetch_pictures(
    admin: Admin, models: Sequence["admin_pb2.Model"], newest: Path, work: Path
) -> list["Pictures"]:
    """Impressions of the first and the last round that made some, and of rounds between; the last stay in `newest`."""
    from fedcore.report.pictures import read_pictures

    made = [model for model in models if model.impressions_digest]
    if not made:
        return []
    chosen = {i * (len(made) - 1) // (PICTURED_ROUNDS - 1) for i in range(PICTURED_ROUNDS)}
    pictures = []
    for index in sorted(chosen):
        last = index == len(made) - 1
        path = newest if last else work / f"impressions-{index}.safetensors"
        try:
            download_artifact(admin, made[index].impressions_digest, path)
        except NotFoundError:
            if last:
                raise
            continue  # Older ones may have been cleared away.
        pictures.append(read_pictures(path, made[index].round))
    return pictures
