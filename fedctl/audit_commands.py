"""fedctl audit: who did what to what, from where; and whether the log is whole."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedctl.admin import Admin, open_admin
from fedctl.render import Column, Output, OutputOption, note, print_json, print_object, print_rows

if TYPE_CHECKING:
    from fedcore.audit import Entry
    from fedcore.v1 import audit_pb2

app = typer.Typer(no_args_is_help=True, help="The coordinator's audit log. Takes the role auditor or owner.")

COLUMNS = [
    Column("NO", "sequence", True), Column("TIME", "moment"), Column("WHO", "actor"), Column("ACTION", "action"),
    Column("OBJECT", "object", wraps=True), Column("RESULT", "result"), Column("DETAIL", "more", wraps=True),
]  # fmt: skip

ActionOption = Annotated[str, typer.Option("--action", help="Actions that begin so: run, run.submit.")]
ActorOption = Annotated[str, typer.Option("--actor", help="Whose name contains this: operator/ann.")]
ObjectOption = Annotated[
    str, typer.Option("--object", help="Whose object contains this: run/blood, site/ward-7.")
]
RefusedOption = Annotated[bool, typer.Option("--refused", help="Only what was refused or failed.")]


@app.command("list")
def list_records(
    ctx: typer.Context,
    action: ActionOption = "",
    actor: ActorOption = "",
    thing: ObjectOption = "",
    refused: RefusedOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """List records, the oldest first. Reading the log is itself recorded."""
    from fedcore.audit_text import Wanted
    from fedcore.v1 import audit_pb2

    wanted = Wanted(action, actor, thing, refused)
    with open_admin(ctx) as admin:
        _, entries = _read(admin, audit_pb2.ReadAuditRequest())
        rows = [row for row in map(_row, entries) if wanted.takes(row)]
    _show(output, rows)


@app.command("tail")
def tail(
    ctx: typer.Context,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, help="How many of the last records.")] = 20,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with records as they are made.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show the last records; with -f one a line, as they are made, until Ctrl-C."""
    from fedcore.v1 import audit_pb2

    with open_admin(ctx) as admin:
        _, entries = _read(admin, audit_pb2.ReadAuditRequest(last=lines, follow=follow))
        if not follow:
            _show(output, [_row(entry) for entry in entries])
            return
        for row in map(_row, entries):
            if output is Output.TABLE:
                print(*(row.get(column.key) or "-" for column in COLUMNS), flush=True)
            else:
                print_json(_plain(row), compact=True)


@app.command("export")
def export(
    ctx: typer.Context,
    out: Annotated[Path | None, typer.Option("--out", help="File to write; stdout if not given.")] = None,
) -> None:
    """Write the whole log as JSON lines, digests included; `fedctl audit verify --file` checks such a file."""
    from fedcore.audit_text import export_line
    from fedcore.errors import ConfigError
    from fedcore.v1 import audit_pb2

    with open_admin(ctx) as admin:
        _, entries = _read(admin, audit_pb2.ReadAuditRequest())
        if out is None:
            for entry in entries:
                sys.stdout.write(export_line(entry) + "\n")
            return
        count = 0
        try:
            with out.open("x", encoding="utf-8") as file:
                for entry in entries:
                    file.write(export_line(entry) + "\n")
                    count += 1
        except OSError as error:
            raise ConfigError(f"{out}: can't be written: {error.strerror}") from error
    note(f"{count} records in {out}")


@app.command("verify")
def verify_log(
    ctx: typer.Context,
    file: Annotated[Path | None, typer.Option("--file", help="Verify an exported file instead.")] = None,
    head: Annotated[
        str,
        typer.Option("--head", help="SEQUENCE:DIGEST kept from an earlier verify: it must still be there."),
    ] = "",
    output: OutputOption = Output.TABLE,
) -> None:
    """Verify the chain here, record by record, against every head that sites have kept; exit code 1 if it is broken.

    Also says which sites' logs have lost records since their last hello.
    """
    from fedcore.audit import Known, verify
    from fedcore.audit_text import head_option, raise_broken, read_export, verdict_document
    from fedcore.v1 import audit_pb2

    given = head_option(head)
    known = [Known("the head given by --head", given)] if given is not None else []
    contradictions: list[str] = []
    if file is not None:
        verdict, whose = verify(read_export(file), known), str(file)
    else:
        with open_admin(ctx) as admin:
            standing, entries = _read(admin, audit_pb2.ReadAuditRequest())
            verdict = verify(entries, known + _known(standing))
        contradictions = [peer.went_back for peer in standing.peers if peer.went_back]
        whose = "the coordinator's audit log"
    report = verdict_document(verdict, contradictions)
    lines = [("records", report["records"]), ("head", report["head"]), ("whole", report["ok"])]
    print_object(output, report, lines)
    raise_broken(whose, report)


def _read(
    admin: Admin, request: "audit_pb2.ReadAuditRequest"
) -> "tuple[audit_pb2.AuditStanding, Iterator[Entry]]":
    """The standing, and the entries as they come."""
    from fedcore.audit import Entry
    from fedcore.errors import ProtocolError

    parts = admin.stream(lambda _: admin.audit.ReadAudit, request)
    first = next(parts, None)
    if first is None or first.WhichOneof("part") != "standing":
        raise ProtocolError(f"{admin.who}: the audit log began without its standing")
    entries = (Entry(part.entry.position, part.entry.body, part.entry.digest) for part in parts)
    return first.standing, entries


def _known(standing: "audit_pb2.AuditStanding") -> list[Any]:
    from fedcore.audit import Known
    from fedcore.audit_heads import head_from_proto

    heads = [Known(one.witness, head_from_proto(one.head, one.witness)) for one in standing.witnesses]
    return [*heads, Known("the coordinator itself", head_from_proto(standing.head, "coordinator"))]


def _row(entry: "Entry") -> dict[str, Any]:
    from fedcore.audit_text import detail_text, document

    record = document(entry)
    return {**record, "details": detail_text(record)}


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "details"}


def _show(output: Output, rows: list[dict[str, Any]]) -> None:
    if output is Output.TABLE:
        rows = [
            {**row, "moment": f"{row['time'][:10]} {row['time'][11:19]}Z", "more": _more(row)} for row in rows
        ]
    else:
        rows = [_plain(row) for row in rows]
    print_rows(output, "records", rows, COLUMNS, empty="no such records")


def _more(row: dict[str, Any]) -> str:
    """A record's details, and where it came from: beside them there is no room for columns of their own."""
    origin = " ".join(
        part for part in (f"as {row['role']}" if row["role"] else "", row["peer"] or "") if part
    )
    return "; ".join(part for part in (row["details"], origin) if part)
