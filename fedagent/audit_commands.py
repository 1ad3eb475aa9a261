"""fedagent audit: what left this site and what arrived, read from the site's own log."""

import json
import sys
from typing import Annotated

import typer

from fedagent.site_commands import HomeOption

OutputOption = Annotated[
    str, typer.Option("--output", "-o", help="table for people, json or jsonl for programs.")
]
_FORMS = ("table", "json", "jsonl")

audit_app = typer.Typer(no_args_is_help=True, help="What left this site and what arrived; is the log whole.")


@audit_app.command("list")
def list_records(
    home: HomeOption,
    action: Annotated[
        str, typer.Option("--action", help="Actions that begin so: artifact, figures.send.")
    ] = "",
    output: OutputOption = "table",
) -> None:
    """List records, the oldest first; also while the agent runs."""
    from fedagent.audit import site_log
    from fedagent.config import AgentHome
    from fedcore.audit_text import Wanted, detail_text, document

    _check(output)
    wanted = Wanted(action=action)
    with site_log(AgentHome(home).audit) as log:
        records = (record for record in map(document, log.walk()) if wanted.takes(record))
        if output == "json":
            typer.echo(json.dumps({"records": list(records)}, indent=2))
            return
        for record in records:
            if output == "jsonl":
                typer.echo(json.dumps(record, separators=(",", ":")))
                continue
            fields = [record.get(key) or "-" for key in ("sequence", "time", "action", "result", "object")]
            typer.echo("  ".join(map(str, [*fields, detail_text(record)])))


@audit_app.command("export")
def export(home: HomeOption) -> None:
    """Write the whole log to stdout as JSON lines, digests included; `fedctl audit verify --file` checks them."""
    from fedagent.audit import site_log
    from fedagent.config import AgentHome
    from fedcore.audit_text import export_line

    with site_log(AgentHome(home).audit) as log:
        for entry in log.walk():
            sys.stdout.write(export_line(entry) + "\n")


@audit_app.command("verify")
def verify_log(
    home: HomeOption,
    head: Annotated[
        str, typer.Option("--head", help="SEQUENCE:DIGEST kept elsewhere: it must still be there.")
    ] = "",
    output: OutputOption = "table",
) -> None:
    """Verify the chain against the heads that the coordinator has kept; exit code 1 if it is broken.

    Also says if the coordinator's log has lost records since an earlier hello, and when it was restored from a backup.
    """
    from fedagent.audit import coordinators_restores, site_log
    from fedagent.config import AgentHome
    from fedcore.audit import Known, verify
    from fedcore.audit_text import head_option, raise_broken, verdict_document

    _check(output)
    given = head_option(head)
    path = AgentHome(home).audit
    with site_log(path) as log:
        known = log.known() + ([Known("the head given by --head", given)] if given is not None else [])
        verdict = verify(log.walk(), known)
        contradictions = [peer.went_back for peer in log.peers() if peer.went_back]
    report = {
        **verdict_document(verdict, contradictions),
        "restores": list(map(str, coordinators_restores(path))),
    }
    if output == "table":
        typer.echo(f"records  {report['records']}\nhead     {report['head']}")
        typer.echo(f"whole    {'yes' if report['ok'] else 'no'}")
        for text in report["restores"]:
            typer.echo(f"note     {text}")
    else:
        typer.echo(json.dumps(report, indent=2 if output == "json" else None))
    raise_broken(str(path), report)


def _check(output: str) -> None:
    if output not in _FORMS:
        raise typer.BadParameter(f"{output!r}: expected {', '.join(_FORMS)}", param_hint="--output")
