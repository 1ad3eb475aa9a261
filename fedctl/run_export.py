"""fedctl run export: a run in a folder, to archive it or to repeat it. Every file is whole or not there.

An export that was cut is begun again with the same command: models that are there are kept, one that had begun to
arrive is resumed. `export.json` says `complete` once everything is there, and names every file with its SHA-256.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcore.digest import file_digest
from fedcore.errors import ConflictError, FedimpresError, NotFoundError, StorageError
from fedctl.admin import Admin, get_run, list_records, open_admin
from fedctl.completion import RunArgument
from fedctl.documents import FINAL_STATES, plan_document, run_document, site_document
from fedctl.model_commands import choose_model, fetch_model, list_models, write_json
from fedctl.render import Output, OutputOption, note, print_object
from fedctl.run_logs import event_document, events_of
from fedctl.transfer import download_artifact

if TYPE_CHECKING:
    from fedcore.v1 import admin_pb2

MANIFEST = "export.json"
CHECKSUMS = "SHA256SUMS"
_INITIAL = "initial.safetensors"


def export(
    ctx: typer.Context,
    run: RunArgument,
    out: Annotated[
        Path, typer.Option("--out", help="Folder to write; one of an earlier export of the run is completed.")
    ],
    output: OutputOption = Output.TABLE,
) -> None:
    """Write a run to a folder: plan, rounds, events, best and last model with their cards, versions, report.

    Everything that is needed to archive it or to repeat it (`fedctl run submit DIR/plan.toml`), but no impressions:
    those are sensitive. Cut off, it is completed by the same command.
    """
    with open_admin(ctx) as admin:
        document = export_run(admin, run, out)
    lines = [(key, value) for key, value in document.items() if key != "files"]
    print_object(output, document, [*lines, ("files", list(document["files"]))])


def export_run(admin: Admin, run: str, out: Path) -> dict[str, Any]:
    """Write everything and return the manifest.

    Raises NotFoundError, ConflictError if the folder holds something else, StorageError, and what downloads raise.
    """
    found = get_run(admin, run)
    _claim(out, found.run)
    if found.state not in FINAL_STATES:
        note(f"run {found.run} is {found.state}: export it again when it has ended")
    records = list_records(admin, found.run)
    models = _fetch_models(admin, found.run, out)
    plan = plan_document(found) or {}
    if _fetch_initial(admin, plan, out):
        plan = {**plan, "training": {**plan["training"], "initial": _INITIAL}}
    toml = plan_toml(plan)
    write_text(out / "plan.toml", toml)
    write_json(out / "run.json", run_document(found))
    write_text(out / "rounds.jsonl", "".join(_line(record) for record in records))
    events = events_of(admin, found.run)
    write_text(out / "events.jsonl", "".join(_line(event_document(event)) for event in events))
    write_json(out / "software.json", _software(admin))
    _write_report(out / "report.html", found, records, toml)
    return _seal(out, found, models)


def plan_toml(plan: Mapping[str, Any]) -> str:
    """A plan as TOML that can be submitted."""
    from fedctl.demo_plan import to_toml

    return to_toml(
        {key: dict(_dotted(value)) if isinstance(value, Mapping) else value for key, value in plan.items()}
    )


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises StorageError."""
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise StorageError(f"{path}: can't be written: {error}") from error


def _claim(out: Path, run: str) -> None:
    """Make the folder this run's, if it is empty or is already. Raises ConflictError, StorageError."""
    manifest = out / MANIFEST
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = json.loads(manifest.read_text(encoding="utf-8"))["run"] if manifest.exists() else None
        strange = there is None and any(out.iterdir())
    except OSError as error:
        raise StorageError(f"{out}: can't be written: {error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConflictError(f"{manifest} is no manifest of an export", hint="give an empty folder") from error
    if strange or there not in (None, run):
        holds = "other files" if strange else f"an export of run {there}"
        raise ConflictError(
            f"{out} holds {holds}, expected nothing or an export of run {run}", hint="give a new folder"
        )
    if there is None:
        write_json(manifest, {"run": run, "complete": False})


def _fetch_models(admin: Admin, run: str, out: Path) -> dict[str, int]:
    """Fetch the best and the last model; says which rounds they are of."""
    models = list_models(admin, run)
    chosen: dict[str, int] = {}
    for which in ("best", "last"):
        try:
            model = choose_model(models, run, which)
        except NotFoundError:
            continue  # no round has finished, or none was validated
        chosen[f"{which}_round"] = model.round
        path = out / f"model-round-{model.round}.safetensors"
        if not (path.is_file() and file_digest(path) == model.digest):
            fetch_model(admin, model, path)
    return chosen


def _fetch_initial(admin: Admin, plan: Mapping[str, Any], out: Path) -> bool:
    """Fetch the model that the run started from, if there is one; says whether it is there."""
    digest = plan.get("training", {}).get("initial")
    if not digest:
        return False
    path = out / _INITIAL
    if not (path.is_file() and file_digest(path) == digest):
        try:
            download_artifact(admin, digest, path)
        except FedimpresError as error:
            raise type(error)(
                f"the model that the run started from: {error.message}", hint=error.hint
            ) from error
    return True


def _software(admin: Admin) -> dict[str, Any]:
    """Versions at the coordinator, at the sites that are there, and here."""
    from fedcore.software import software
    from fedcore.v1 import admin_pb2, operations_pb2

    reply = admin.call(lambda _: admin.operations.GetSoftware, operations_pb2.GetSoftwareRequest())
    sites = admin.call(lambda stub: stub.ListSites, admin_pb2.ListSitesRequest()).sites
    kept = ("software_version", "device")
    return {
        "note": "as of the export; device and threads of each site in each round are in rounds.jsonl",
        "coordinator": json.loads(reply.software_json),
        "sites": {site.id: {key: site_document(site)[key] for key in kept} for site in sites},
        "fedctl": software(),
    }


def _write_report(path: Path, run: "admin_pb2.Run", records: list[dict[str, Any]], toml: str) -> None:
    from fedcore.report.page import write_report

    plan = plan_document(run) or {}
    facts = {
        "run": run.run,
        "strategy": run.strategy,
        "sites": ", ".join(run.sites),
        "submitted": run.submitted_at,
    }
    if run.reason:
        facts["reason"] = run.reason
    write_report(
        path,
        title=f"Run {run.name}",
        state=run.state,
        facts=facts,
        records=records,
        class_names=plan.get("data", {}).get("class_names") or (),
        command="fedctl run submit plan.toml",
        plan_toml=toml,
    )


def _seal(out: Path, run: "admin_pb2.Run", models: Mapping[str, int]) -> dict[str, Any]:
    """Write checksums and manifest: the export is complete."""
    digests = {
        path.name: file_digest(path)
        for path in sorted(out.iterdir())
        if path.is_file() and path.name not in (MANIFEST, CHECKSUMS) and path.suffix != ".part"
    }
    write_text(out / CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    document = {
        "run": run.run,
        "state": run.state,
        **models,
        "complete": True,
        "path": str(out),
        "files": digests,
    }
    write_json(out / MANIFEST, document)
    return document


def _dotted(section: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """A section with its tables as dotted keys."""
    rows: list[tuple[str, Any]] = []
    for key, value in section.items():
        rows += (
            _dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
        )
    return rows


def _line(document: Mapping[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False) + "\n"
