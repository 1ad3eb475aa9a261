"""fedctl impression: the impressions that runs have made. Sensitive: looking takes a role, and can be undone by purging."""

import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcore.errors import UsageError
from fedctl.admin import Admin, open_admin
from fedctl.durations import format_bytes
from fedctl.impression_view import LIST_COLUMNS, bank_document, bank_lines, list_row, next_steps
from fedctl.render import Output, OutputOption, note, print_object, print_rows

if TYPE_CHECKING:
    from fedcore.v1 import impressions_pb2, tensor_pb2

app = typer.Typer(
    no_args_is_help=True, help="The impressions that runs have made: who holds them, what they show."
)

RunArgument = Annotated[str, typer.Argument(help="Id of the run, or a unique beginning of one.")]
RoundOption = Annotated[
    int, typer.Option("--round", min=0, help="The round that made them; the newest if not given.")
]


@app.command("list")
def list_command(
    ctx: typer.Context,
    run: Annotated[str, typer.Argument(help="Only this run's.")] = "",
    output: OutputOption = Output.TABLE,
) -> None:
    """List the rounds that made impressions: how many, of which classes, which sites hold them, what was purged."""
    with open_admin(ctx) as admin:
        banks = list_banks(admin, run)
    rows = [list_row(bank) if output is Output.TABLE else bank_document(bank) for bank in banks]
    print_rows(output, "banks", rows, LIST_COLUMNS, empty="no impressions")


@app.command("show")
def show(
    ctx: typer.Context, run: RunArgument, round_: RoundOption = 0, output: OutputOption = Output.TABLE
) -> None:
    """Show what a round's impressions are made of, how near they come to the sites' images, and how far a purge is."""
    with open_admin(ctx) as admin:
        bank = get_bank(admin, run, round_)
    print_object(output, bank_document(bank, full=True), bank_lines(bank))


@app.command("preview")
def preview(
    ctx: typer.Context,
    run: RunArgument,
    out: Annotated[
        Path, typer.Option("--out", help="Picture (.png) or page (.html) to write, readable by you only.")
    ],
    round_: RoundOption = 0,
    per_class: Annotated[
        int, typer.Option("--per-class", min=1, max=1000, help="At most so many of each class.")
    ] = 24,
    output: OutputOption = Output.TABLE,
) -> None:
    """Look at a round's impressions, by class. Takes the role auditor or owner; the coordinator records it."""
    from fedcore.report.contact_sheet import Caption, check_sheet_path, write_sheet
    from fedcore.report.pictures import read_pictures

    check_sheet_path(out)
    with open_admin(ctx) as admin, tempfile.TemporaryDirectory(prefix="fedctl-") as private:
        bank = get_bank(admin, run, round_)
        path = Path(private) / "impressions.safetensors"
        fetch_bank(admin, bank, path)
        pictures = read_pictures(path, bank.round)
    facts = (
        f"Run {bank.run} · round {bank.round} · {len(pictures.labels)} impressions of {len(bank.classes)} classes"
        f" · {pictures.images.shape[3]} × {pictures.images.shape[2]} pixels · digest {bank.digest[:12]}"
    )
    write_sheet(out, pictures, bank.class_names, Caption("Federated impressions", facts), per_class=per_class)
    document = {
        "run": bank.run, "round": bank.round, "digest": bank.digest, "num_images": len(pictures.labels), "path": str(out),
    }  # fmt: skip
    print_object(output, document, [(key.replace("_", " "), value) for key, value in document.items()])


@app.command("purge")
def purge(
    ctx: typer.Context,
    run: RunArgument,
    reason: Annotated[str, typer.Option("--reason", help="Why; it stands in the audit logs of all sites.")],
    round_: Annotated[int, typer.Option("--round", min=0, help="The bank of this round.")] = 0,
    everything: Annotated[bool, typer.Option("--all", help="The banks of all rounds.")] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also what a run under way uses: it goes on at once without a bank."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask; needed off a terminal.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Delete impressions for good: at the coordinator at once, at every site as soon as it is connected. Takes the role
    owner. Models and records stay; `impression show` says which sites have confirmed.
    """
    from fedcore.v1 import impressions_pb2

    if everything == bool(round_):
        raise UsageError("`impression purge` needs one of --round N and --all")
    if not reason.strip():
        raise UsageError("`impression purge` needs a --reason: it stands in the audit logs of all sites")
    if not yes and not sys.stdin.isatty():
        raise UsageError("`impression purge` can't ask for confirmation off a terminal", hint="add --yes")
    what = "all impressions" if everything else f"the impressions of round {round_}"
    if not yes and not typer.confirm(f"Delete {what} of run {run}, here and at its sites?", err=True):
        note("nothing done")
        raise typer.Exit(1)
    with open_admin(ctx) as admin:
        request = impressions_pb2.PurgeImpressionsRequest(
            run=run, round=round_, all=everything, reason=reason, force=force
        )
        reply = admin.call(lambda _: admin.impressions.PurgeImpressions, request)
    if output is Output.TABLE:
        print_rows(
            output, "banks", [list_row(bank) for bank in reply.banks], LIST_COLUMNS, empty="no impressions"
        )
    else:
        document = {
            "purged": reply.purged,
            "other_runs": list(reply.other_runs),
            "banks": [bank_document(bank) for bank in reply.banks],
        }
        print_object(output, document, [])
    for line in next_steps(reply):
        note(line)


def list_banks(admin: Admin, run: str) -> "list[impressions_pb2.ImpressionBank]":
    """Banks of all runs, or of one, by run and round. Raises NotFoundError."""
    from fedcore.v1 import impressions_pb2

    found: list[impressions_pb2.ImpressionBank] = []
    token = None
    while token != "":
        request = impressions_pb2.ListImpressionsRequest(run=run, page_token=token or "")
        reply = admin.call(lambda _: admin.impressions.ListImpressions, request)
        found += reply.banks
        token = reply.next_page_token
    return found


def get_bank(admin: Admin, run: str, round_: int) -> "impressions_pb2.ImpressionBank":
    """A round's bank; the newest for 0. Raises NotFoundError."""
    from fedcore.v1 import impressions_pb2

    request = impressions_pb2.GetImpressionsRequest(run=run, round=round_)
    return admin.call(lambda _: admin.impressions.GetImpressions, request)


def fetch_bank(admin: Admin, bank: "impressions_pb2.ImpressionBank", path: Path) -> None:
    """Fetch a bank to be looked at, verified by its digest. Raises what `download_artifact` raises."""
    from fedcore.v1 import impressions_pb2
    from fedctl.transfer import download_artifact

    def stream_from(offset: int) -> "Generator[tensor_pb2.ArtifactPart, None, None]":
        request = impressions_pb2.PreviewImpressionsRequest(run=bank.run, round=bank.round, offset=offset)
        return admin.stream(lambda _: admin.impressions.PreviewImpressions, request)

    download_artifact(admin, bank.digest, path, stream_from=stream_from)
    note(f"{format_bytes(path.stat().st_size)} fetched, digest verified")
