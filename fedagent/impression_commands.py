"""fedagent impressions: the banks that lie at this site, looked at and removed by the site's own hand."""

import json
import os
import pwd
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedagent.site_commands import HomeOption, home_of

if TYPE_CHECKING:
    from fedagent.config import AgentHome
    from fedagent.held_impressions import HeldBank

OutputOption = Annotated[
    str, typer.Option("--output", "-o", help="table for people, json or jsonl for programs.")
]
DigestArgument = Annotated[str, typer.Argument(help="Digest of the bank, or a unique beginning of one.")]
_FORMS = ("table", "json", "jsonl")

impressions_app = typer.Typer(
    no_args_is_help=True, help="Impressions on this site's disk: list, look at, remove them."
)


@impressions_app.command("list")
def list_banks(home: HomeOption, output: OutputOption = "table") -> None:
    """List the banks that lie here, with the run and round that they came for; also while the agent runs."""
    from fedagent.held_impressions import HeldImpressions

    _check(output)
    paths = home_of(home)
    came = _arrivals(paths)
    rows = [
        {
            "digest": bank.digest,
            "images": bank.num_images,
            "bytes": bank.size_bytes,
            "whole": bank.whole,
            **came.get(bank.digest, {"run": None, "round": None, "received_at": None}),
        }
        for bank in HeldImpressions(paths.artifacts).banks()
    ]
    if output == "json":
        typer.echo(json.dumps({"banks": rows}, indent=2))
        return
    for row in rows:
        if output == "jsonl":
            typer.echo(json.dumps(row, separators=(",", ":")))
        else:
            part = "" if row["whole"] else "  (in part)"
            where = f"run {row['run']}, round {row['round']}" if row["run"] else "run not known"
            typer.echo(
                f"{row['digest']}  {row['images']} images  {row['bytes']} bytes  {where}  {row['received_at'] or '-'}{part}"
            )
    if not rows:
        typer.echo("no impressions lie here", err=True)


@impressions_app.command("preview")
def preview(
    home: HomeOption,
    digest: DigestArgument,
    out: Annotated[
        Path, typer.Option("--out", help="Picture to write (.png or .html), readable by you only.")
    ],
) -> None:
    """Show a bank as one picture. Recorded in the site's audit log; policy.toml can forbid it (show_impressions)."""
    from fedagent.audit import open_site_audit
    from fedagent.policy import load_policy
    from fedcore.audit import OK, Fact
    from fedcore.audit_store import AuditLog
    from fedcore.errors import PermissionDeniedError
    from fedcore.report.contact_sheet import Caption, write_sheet
    from fedcore.report.pictures import read_pictures

    paths = home_of(home)
    bank = _one(paths, digest)
    allowed = load_policy(paths.policy).show_impressions
    database = open_site_audit(paths.audit)
    try:
        result = OK if allowed else PermissionDeniedError.code
        fact = Fact(
            "impressions.preview",
            person(),
            object=f"artifact/{bank.digest}",
            result=result,
            detail={"out": str(out)},
        )
        AuditLog(database).record_now(fact)
    finally:
        database.close()
    if not allowed:
        raise PermissionDeniedError(
            "this site's policy forbids to show impressions", hint=f"show_impressions in {paths.policy}"
        )
    came = _arrivals(paths).get(bank.digest, {})
    where = f"Run {came['run']}, trained on in round {came['round']}" if came else "Run not known"
    caption = Caption("Impressions at this site", f"{where} · digest {bank.digest[:12]}")
    write_sheet(out, read_pictures(bank.path, 0), (), caption)
    typer.echo(f"{out}: {bank.num_images} impressions, classes by their number in the run's plan")


@impressions_app.command("purge")
def purge(
    home: HomeOption,
    digest: Annotated[
        str, typer.Argument(help="Digest of the bank, or a unique beginning of one; or --all.")
    ] = "",
    everything: Annotated[bool, typer.Option("--all", help="All banks that lie here.")] = False,
    reason: Annotated[str, typer.Option("--reason", help="Why; it stands in the site's audit log.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask; needed off a terminal.")] = False,
) -> None:
    """Delete impressions from this site's disk, whatever the coordinator wants; also while the agent runs.

    A run under way may bring them again: `receive_impressions = false` in policy.toml keeps them out.
    """
    from fedagent.audit import open_site_audit, purge_fact
    from fedagent.held_impressions import HeldImpressions
    from fedcore.audit_store import AuditLog
    from fedcore.errors import ConfigError

    if bool(digest) == everything:
        raise ConfigError("`impressions purge` needs a DIGEST or --all")
    if not yes and not sys.stdin.isatty():
        raise ConfigError("`impressions purge` can't ask for confirmation off a terminal", hint="add --yes")
    paths = home_of(home)
    held = HeldImpressions(paths.artifacts)
    digests = held.digests() if everything else [_one(paths, digest).digest]
    if not yes and not typer.confirm(f"Delete {len(digests)} banks of impressions?", err=True):
        typer.echo("nothing done", err=True)
        raise typer.Exit(1)
    database = open_site_audit(paths.audit)
    try:
        deleted = held.erase(digests)
        AuditLog(database).record_now(
            purge_fact(deleted, asked=len(digests), purge="", by=person(), reason=reason)
        )
    finally:
        database.close()
    for one in deleted:
        typer.echo(f"deleted {one}")
    if not deleted:
        typer.echo("no impressions lie here", err=True)


def _arrivals(paths: "AgentHome") -> dict[str, dict[str, Any]]:
    """Run, round and time with which each bank came last, from the site's audit log."""
    from fedagent.audit import site_log
    from fedcore.audit_text import document

    found: dict[str, dict[str, Any]] = {}
    if not paths.audit.exists():
        return found
    with site_log(paths.audit) as log:
        for record in map(document, log.walk()):
            detail = record["detail"]
            if record["action"] == "artifact.receive" and detail.get("purpose") == "impressions":
                digest = record["object"].removeprefix("artifact/")
                found[digest] = {
                    "run": detail["run"],
                    "round": detail["round"],
                    "received_at": record["time"],
                }
    return found


def _one(paths: "AgentHome", digest: str) -> "HeldBank":
    from fedagent.held_impressions import HeldImpressions
    from fedcore.errors import NotFoundError

    found = [
        bank
        for bank in HeldImpressions(paths.artifacts).banks()
        if bank.whole and bank.digest.startswith(digest)
    ]
    if len(found) != 1:
        raise NotFoundError(
            f"{len(found)} banks begin with '{digest}', expected one",
            hint="`fedagent impressions list` shows them",
        )
    return found[0]


def person() -> str:
    """Whose hand it is: the account that runs this command."""
    try:
        return f"account/{pwd.getpwuid(os.getuid()).pw_name}"
    except KeyError:
        return f"account/{os.getuid()}"


def _check(output: str) -> None:
    if output not in _FORMS:
        raise typer.BadParameter(f"{output!r}: expected {', '.join(_FORMS)}", param_hint="--output")
