"""fedctl server: the coordinator itself: is it well, how is it set up, stop it in peace."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcore.errors import CallTimeoutError, UsageError
from fedctl.admin import Admin, open_admin
from fedctl.documents import drain_document, health_document
from fedctl.durations import format_duration, parse_duration
from fedctl.render import (
    Column,
    Output,
    OutputOption,
    note,
    print_json,
    print_object,
    print_rows,
    print_table,
)

if TYPE_CHECKING:
    from fedcore.v1 import operations_pb2

app = typer.Typer(
    no_args_is_help=True, help="The coordinator itself: health, configuration, drain, debug bundle."
)

DEGRADED = 8
_LOOK_EVERY_S = 0.5


@app.command("health")
def health(ctx: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """Show what is true of each part of the coordinator. Exit code: 0 healthy, 8 degraded, 3 not reachable.

    Looked at: every service, the database (it is written to), the journal's lag, disk space, what artifacts take of
    the storage quota, the compute process,
    the days that certificate and CAs have left, each enabled site's last contact, a drain.
    """
    from fedcore.v1 import operations_pb2

    with open_admin(ctx) as admin:
        reply = admin.call(lambda _: admin.operations.GetHealth, operations_pb2.GetHealthRequest())
    document = health_document(reply)
    if output is Output.TABLE:
        rows = [
            {**fact, "state": "ok" if fact["healthy"] else "DEGRADED", "name": _name(fact)}
            for fact in document["facts"]
        ]
        columns = [
            Column("PART", "name"),
            Column("STATE", "state"),
            Column("", "says", wraps=True),
            Column("DO", "hint", wraps=True),
        ]
        print_table(rows, columns)
        bad = sum(not fact["healthy"] for fact in document["facts"])
        note("healthy" if reply.healthy else f"degraded: {bad} of {len(rows)} parts are not well")
    else:
        print_json(document, compact=output is Output.JSONL)
    raise typer.Exit(0 if reply.healthy else DEGRADED)


@app.command("config")
def config(ctx: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """Show the configuration in force: what fedserver.toml says, and the defaults of the rest. Secrets are masked."""
    from fedcore.v1 import operations_pb2

    with open_admin(ctx) as admin:
        reply = admin.call(lambda _: admin.operations.GetConfig, operations_pb2.GetConfigRequest())
    rows: list[dict[str, Any]] = [
        {"key": one.key, "value": json.loads(one.value_json), "from_file": one.from_file}
        for one in reply.settings
    ]
    if output is Output.TABLE:
        rows = [{**row, "source": "fedserver.toml" if row["from_file"] else "default"} for row in rows]
    columns = [Column("KEY", "key"), Column("VALUE", "value", wraps=True), Column("FROM", "source")]
    print_rows(output, "settings", rows, columns, empty="no settings")


@app.command("drain")
def drain(
    ctx: typer.Context,
    undo: Annotated[bool, typer.Option("--undo", help="Open rounds again.")] = False,
    reason: Annotated[str, typer.Option(help="Why; agents and other operators read it.")] = "",
    wait: Annotated[
        bool, typer.Option("--wait", help="Return once nothing is under way: stop the coordinator then.")
    ] = False,
    timeout: Annotated[
        str | None, typer.Option(help="With --wait, give up after so long: 90s, 15m, 2h (exit code 5).")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Open no further round; the one under way is finished, then the coordinator can be stopped in peace.

    Runs stay as they are and go on after --undo, or when the coordinator is started again: a drain ends with the
    process.
    """
    from fedcore.v1 import operations_pb2

    if undo and (wait or reason):
        raise UsageError("--undo goes with neither --wait nor --reason", hint="undo takes effect at once")
    timeout_s = parse_duration(timeout) if timeout else None
    with open_admin(ctx) as admin:
        request = operations_pb2.SetDrainRequest(draining=not undo, reason=reason)
        state = admin.call(lambda _: admin.operations.SetDrain, request)
        if wait and not state.quiet:
            note(f"waiting for {state.under_way}")
            state = _wait_quiet(admin, timeout_s)
    document = drain_document(state)
    print_object(output, document, list(document.items()))


@app.command("debug-bundle")
def debug_bundle(
    ctx: typer.Context,
    out: Annotated[
        Path, typer.Option("--out", help="Archive to write, FILE.tar.gz; must not exist.", dir_okay=False)
    ],
    output: OutputOption = Output.TABLE,
) -> None:
    """Collect what helps to find a fault: versions, configuration, health, log, threads, database, runs, sites.

    No key, token, passphrase, image or impression is in it, but names of sites and operators are. Takes the role owner.
    """
    from fedcore.v1 import operations_pb2
    from fedctl.bundle_file import write_bundle

    with open_admin(ctx) as admin:
        parts = admin.stream(lambda _: admin.operations.CollectBundle, operations_pb2.CollectBundleRequest())
        names = write_bundle(out, parts)
    document = {"path": str(out), "bytes": out.stat().st_size, "files": names}
    print_object(output, document, list(document.items()))


def _wait_quiet(admin: Admin, timeout_s: float | None) -> "operations_pb2.DrainState":
    """Ask until nothing is under way. Raises CallTimeoutError; ConflictError if somebody undoes the drain."""
    from fedcore.errors import ConflictError
    from fedcore.v1 import operations_pb2

    started = time.monotonic()
    while True:
        state = admin.call(lambda _: admin.operations.GetHealth, operations_pb2.GetHealthRequest()).drain
        if not state.draining:
            raise ConflictError("the drain was undone meanwhile, or the coordinator was started again")
        if state.quiet:
            return state
        if timeout_s is not None and time.monotonic() - started >= timeout_s:
            raise CallTimeoutError(
                f"still under way after {format_duration(timeout_s)}: {state.under_way}",
                hint="the drain stands; wait longer, or undo it: fedctl server drain --undo",
            )
        time.sleep(_LOOK_EVERY_S)


def _name(fact: dict[str, Any]) -> str:
    return f"{fact['check']} {fact['subject']}".rstrip()
