"""fedctl model: the models that runs have made."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcore.digest import file_digest
from fedcore.errors import DigestMismatchError, NotFoundError, StorageError, UsageError
from fedcore.tensor_file import read_manifest
from fedcore.text import ranges
from fedctl.admin import Admin, open_admin
from fedctl.completion import RunArgument
from fedctl.documents import model_document
from fedctl.durations import format_bytes
from fedctl.render import (
    Column,
    Output,
    OutputOption,
    console,
    minute,
    note,
    percent,
    print_object,
    print_rows,
)

if TYPE_CHECKING:
    from fedcore.v1 import admin_pb2
    from fedctl.transfer import OnBytes

# Enough to tell models apart; `-o json` has all of it.
_DIGEST_DIGITS = 12
RoundOption = Annotated[
    str, typer.Option("--round", help="A round's number, 'best' (by validation accuracy) or 'last'.")
]
app = typer.Typer(no_args_is_help=True, help="The models that runs have made.")


@app.command("list")
def list_command(ctx: typer.Context, run: RunArgument, output: OutputOption = Output.TABLE) -> None:
    """List the models of a run, one a finished round, with those that were dropped to save disk."""
    with open_admin(ctx) as admin:
        rows = [model_document(model) for model in list_models(admin, run)]
    if output is Output.TABLE:
        for row in rows:
            metrics = (row["card"] or {}).get("metrics") or {}
            row["size"] = "" if row["bytes"] is None else format_bytes(row["bytes"])
            row["accuracy"] = percent(metrics.get("accuracy"))
            row["digest"] = row["digest"][:_DIGEST_DIGITS]
            row["best"] = "best" if row["best"] else " "
            row["dropped"] = minute(row["dropped_at"]) or " "
    columns = [
        Column("ROUND", "round", True), Column("BEST", "best"), Column("ACCURACY", "accuracy", True),
        Column("SIZE", "size", True), Column("DIGEST", "digest"),
    ]  # fmt: skip
    if any(row["dropped_at"] for row in rows):
        columns += [Column("DROPPED", "dropped"), Column("WHY", "dropped_reason", wraps=True)]
    print_rows(output, "models", rows, columns, empty="no model yet: no round has finished")


@app.command("download")
def download(
    ctx: typer.Context,
    run: RunArgument,
    round_: RoundOption = "last",
    out: Annotated[Path, typer.Option("--out", help="File to write; its card goes beside it.")] = Path(
        "model.safetensors"
    ),
    output: OutputOption = Output.TABLE,
) -> None:
    """Download a model: a safetensors file, checked by its digest, and its card (architecture, classes,
    transform).
    """
    with open_admin(ctx) as admin:
        models = list_models(admin, run)
        model = choose_model(models, run, round_)
        _check_there(model, models)
        fetch_model(admin, model, out)
    document = {
        "run": model.run,
        "round": model.round,
        "digest": model.digest,
        "path": str(out),
        "card": str(card_path(out)),
    }
    print_object(output, document, list(document.items()))


@app.command("show")
def show(
    ctx: typer.Context, run: RunArgument, round_: RoundOption = "last", output: OutputOption = Output.TABLE
) -> None:
    """Show a model's card: architecture, classes, transform, figures."""
    with open_admin(ctx) as admin:
        document = model_document(choose_model(list_models(admin, run), run, round_))
    card = document["card"] or {}
    shown = {key: value for key, value in document.items() if key != "card" and value is not None} | card
    lines = [
        (key, value if isinstance(value, str | int | float) else json.dumps(value))
        for key, value in shown.items()
    ]
    print_object(output, document, lines)


@app.command("verify")
def verify(
    path: Annotated[
        Path, typer.Argument(help="A downloaded model; its card lies beside it.", dir_okay=False)
    ],
    output: OutputOption = Output.TABLE,
) -> None:
    """Check a downloaded model against its card: the digest of its bytes, and that they are a model file. Asks nobody."""
    document = verified(path)
    print_object(output, document, list(document.items()))


def verified(path: Path) -> dict[str, object]:
    """What the card of a model file says, once file and digest agree.

    Raises NotFoundError, StorageError, DigestMismatchError.
    """
    card_file = card_path(path)
    for needed in (path, card_file):
        if not needed.is_file():
            raise NotFoundError(f"{needed}: no such file", hint="fedctl model download writes both")
    try:
        card = json.loads(card_file.read_text(encoding="utf-8"))
        expected = str(card["digest"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{card_file}: is no model's card: {error!r}") from error
    got = file_digest(path)
    if got != expected:
        raise DigestMismatchError(
            f"{path}: digest of the bytes is {got}, its card says {expected}", hint="download it again"
        )
    manifest, _ = read_manifest(path)
    return {
        "path": str(path),
        "digest": got,
        "run": card.get("run"),
        "round": card.get("round"),
        "tensors": len(manifest.tensors),
        "bytes": manifest.payload_bytes,
    }


def list_models(admin: Admin, run: str) -> list["admin_pb2.Model"]:
    """The models of a run, by round, dropped ones too. Raises NotFoundError."""
    from fedcore.v1 import admin_pb2

    models: list[admin_pb2.Model] = []
    token = None
    while token != "":
        request = admin_pb2.ListModelsRequest(run=run, page_token=token or "", dropped=True)
        reply = admin.call(lambda stub: stub.ListModels, request)
        models += reply.models
        token = reply.next_page_token
    return sorted(models, key=lambda model: model.round)


def choose_model(models: list["admin_pb2.Model"], run: str, choice: str) -> "admin_pb2.Model":
    """The model of a round: a number, "best" or "last". Raises ConfigError, NotFoundError."""
    if not (choice in ("best", "last") or choice.isdecimal()):
        raise UsageError(f"--round {choice}: not a round", hint="give a number, 'best' or 'last'")
    if not models:
        raise NotFoundError(f"run {run} has no model yet: no round has finished")
    if choice == "last":
        return models[-1]
    for model in models:
        if (choice == "best" and model.best) or (choice != "best" and model.round == int(choice)):
            return model
    if choice == "best":
        raise NotFoundError(
            f"run {run} has no best round: no site has validated a model", hint="use --round last"
        )
    raise NotFoundError(
        f"run {run} has no model of round {choice}", hint=f"it has rounds up to {models[-1].round}"
    )


def _check_there(model: "admin_pb2.Model", models: list["admin_pb2.Model"]) -> None:
    """Raise NotFoundError that says when and why, if the model was dropped."""
    if model.dropped_at:
        there = ranges([other.round for other in models if not other.dropped_at])
        raise NotFoundError(
            f"run {model.run}: the model of round {model.round} was dropped at {model.dropped_at}: "
            f"{model.dropped_reason}",
            hint=f"rounds whose model is there: {there}",
        )


def fetch_model(admin: Admin, model: "admin_pb2.Model", out: Path) -> None:
    """Download a model to `out` and its card beside it. Raises what `download_artifact` raises,
    StorageError.
    """
    from fedctl.transfer import download_artifact

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out.parent}: can't be made: {error}") from error
    with _byte_progress(out.name) as on_bytes:
        download_artifact(admin, model.digest, out, on_bytes=on_bytes)
    card = json.loads(model.card_json) if model.card_json else {}
    write_json(card_path(out), {**card, "digest": model.digest, "run": model.run, "round": model.round})
    note(f"{out}: {format_bytes(model.payload_bytes)}, round {model.round}, digest verified")


def card_path(out: Path) -> Path:
    """Where the card of a model file lies: model.safetensors -> model.json."""
    return out.with_suffix(".json") if out.suffix == ".safetensors" else out.with_name(out.name + ".json")


def write_json(path: Path, document: object) -> None:
    """Write a JSON file whole or not at all. Raises StorageError."""
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump(document, file, indent=2, ensure_ascii=False)
            file.write("\n")
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError as error:
        raise StorageError(f"{path}: can't be written: {error}") from error


@contextlib.contextmanager
def _byte_progress(name: str) -> Iterator["OnBytes"]:
    """A progress bar of bytes on stderr if that is a terminal, nothing otherwise."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
