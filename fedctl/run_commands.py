"""fedctl run: submit runs, look at them, steer them."""

import uuid
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcore.errors import PlanError
from fedctl import run_export, run_logs, run_plan
from fedctl.admin import Admin, get_run, list_records, open_admin
from fedctl.asking import YesOption, agree, check_can_ask
from fedctl.completion import RunArgument
from fedctl.documents import plan_document, run_document
from fedctl.durations import format_bytes, format_duration, parse_duration
from fedctl.render import (
    Column,
    Output,
    OutputOption,
    minute,
    note,
    percent,
    print_json,
    print_object,
    print_rows,
)

if TYPE_CHECKING:
    from fedcore.v1 import admin_pb2

app = typer.Typer(no_args_is_help=True, help="Submit runs, look at them, steer them.")

ReasonOption = Annotated[str, typer.Option(help="Why; goes into the run's record.")]
EXIT_CODES = {"DONE": 0, "DEGRADED": 8}


@app.command("submit")
def submit(
    ctx: typer.Context,
    plan: Annotated[Path, typer.Argument(help="The plan, a TOML file.")],
    request_id: Annotated[
        str,
        typer.Option(
            "--request-id",
            help="A name for this submission: with the same name and plan a script that tries again gets the same run.",
        ),
    ] = "",
    output: OutputOption = Output.TABLE,
) -> None:
    """Submit a plan; it runs when the runs before it have ended."""
    with open_admin(ctx) as admin:
        run = submit_plan(admin, plan, request_id)
    if output is Output.TABLE:
        print(run)
        note(f"follow it with: fedctl run watch {run}")
    else:
        print_json({"run": run}, compact=output is Output.JSONL)


@app.command("list")
def list_runs(ctx: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List the runs, the newest first."""
    from fedcore.v1 import admin_pb2

    with open_admin(ctx) as admin:
        rows, token = [], None
        while token != "":
            request = admin_pb2.ListRunsRequest(page_token=token or "")
            reply = admin.call(lambda stub: stub.ListRuns, request)
            rows += [run_document(run) for run in reply.runs]
            token = reply.next_page_token
    for row in rows:
        row["progress_text"] = f"{row['round']}/{row['rounds']}"
        row["submitted_text"] = minute(row["submitted_at"])
    columns = [
        Column("RUN", "run"), Column("NAME", "name"), Column("STATE", "state"),
        Column("ROUND", "progress_text", True), Column("STRATEGY", "strategy"),
        Column("SUBMITTED", "submitted_text"), Column("REASON", "reason", wraps=True),
    ]  # fmt: skip
    if output is not Output.TABLE:
        rows = [
            {k: v for k, v in row.items() if k not in ("progress_text", "submitted_text")} for row in rows
        ]
    print_rows(output, "runs", rows, columns, empty="no runs; fedctl run submit PLAN.toml")


@app.command("show")
def show(ctx: typer.Context, run: RunArgument, output: OutputOption = Output.TABLE) -> None:
    """Show a run: its state and why it is in it, its sites, its rounds so far."""
    with open_admin(ctx) as admin:
        message = get_run(admin, run)
    _print_run(output, message)


@app.command("watch")
def watch(ctx: typer.Context, run: RunArgument, output: OutputOption = Output.TABLE) -> None:
    """Watch a run live until it has ended; goes on by itself when the coordinator restarts."""
    from fedctl.run_watch import watch_run

    with open_admin(ctx) as admin:
        watch_run(admin, run, output)


@app.command("wait")
def wait(
    ctx: typer.Context,
    run: RunArgument,
    timeout: Annotated[
        str | None, typer.Option(help="Give up after so long: 90s, 15m, 2h (exit code 5).")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Wait until a run has ended. Exit code: 0 DONE, 8 DEGRADED, 1 FAILED or ABORTED."""
    from fedctl.following import follow_run

    timeout_s = parse_duration(timeout) if timeout else None
    with open_admin(ctx) as admin:
        updates = follow_run(
            admin, run, on_trouble=lambda text: note(text or "connected again"), timeout_s=timeout_s
        )
        (last,) = deque(updates, maxlen=1)
    _print_run(output, last)
    raise typer.Exit(EXIT_CODES.get(last.state, 1))


@app.command("pause")
def pause(ctx: typer.Context, run: RunArgument, output: OutputOption = Output.TABLE) -> None:
    """Pause a run after what is under way; `resume` goes on with it."""
    with open_admin(ctx) as admin:
        message = admin.call(lambda stub: stub.PauseRun, _control(run))
    _print_run(output, message)


@app.command("resume")
def resume(ctx: typer.Context, run: RunArgument, output: OutputOption = Output.TABLE) -> None:
    """Go on with a paused run."""
    with open_admin(ctx) as admin:
        message = admin.call(lambda stub: stub.ResumeRun, _control(run))
    _print_run(output, message)


@app.command("abort")
def abort(
    ctx: typer.Context,
    run: RunArgument,
    reason: ReasonOption = "",
    yes: YesOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """End a run for good; what is under way is given up, finished rounds stay."""
    check_can_ask("run abort", yes=yes)
    with open_admin(ctx) as admin:
        message = get_run(admin, run)
        agree(
            f"Abort run {message.run} ({message.name}), {message.round} of {message.rounds} rounds finished?",
            yes=yes,
        )
        message = admin.call(lambda stub: stub.AbortRun, _control(message.run, reason))
    _print_run(output, message)


@app.command("rounds")
def rounds(ctx: typer.Context, run: RunArgument, output: OutputOption = Output.TABLE) -> None:
    """Show the finished rounds of a run: sites, accuracy, impressions, time, bytes; and whom each round missed, and why.

    SITES counts those expected / registered / started / reported / aggregated; MADE and REFUSED count impressions.
    """
    with open_admin(ctx) as admin:
        records = list_records(admin, run)
    if output is not Output.TABLE:
        print_rows(output, "rounds", records, [], empty="")
        return
    columns = [
        Column("ROUND", "round", True), Column("ACCURACY", "accuracy", True),
        Column("BALANCED", "balanced", True), Column("SITES", "counts", True),
        Column("GATE", "gate", wraps=True), Column("MADE", "made", True), Column("REFUSED", "refused", True),
        Column("TIME", "time", True),
        Column("UP", "up", True), Column("DOWN", "down", True),
    ]  # fmt: skip
    print_rows(
        output, "rounds", [_round_row(record) for record in records], columns, empty="no finished round yet"
    )
    for record in records:
        for site, why in record.get("missing", {}).items():
            print(f"round {record['round']} missed {site}: {why}")


app.command("plan")(run_plan.plan)
app.command("logs")(run_logs.logs)
app.command("export")(run_export.export)


def submit_plan(admin: Admin, path: Path, request_id: str = "") -> str:
    """Check a plan here, upload the model that it starts from if that is a file of ours, submit; return the
    run's id. A repetition with the same `request_id` gives the same run.

    Raises PlanError before anything is sent, and what the coordinator answers.
    """
    from fedcore.plan import load_plan
    from fedcore.v1 import admin_pb2

    plan = load_plan(path)
    initial_digest = ""
    if plan.training.initial is not None and plan.training.initial.endswith(".safetensors"):
        initial = path.parent / plan.training.initial
        if not initial.is_file():
            raise PlanError(f"{path}: training.initial: no such file: {initial}")
        from fedctl.transfer import upload_model

        initial_digest = upload_model(admin, initial)
    request = admin_pb2.SubmitRunRequest(
        plan_toml=path.read_text(encoding="utf-8"),
        request_id=request_id or str(uuid.uuid4()),
        initial_digest=initial_digest,
    )
    return admin.call(lambda stub: stub.SubmitRun, request).run


def _control(run: str, reason: str = "") -> "admin_pb2.ControlRunRequest":
    from fedcore.v1 import admin_pb2

    return admin_pb2.ControlRunRequest(run=run, reason=reason)


def _print_run(output: Output, run: "admin_pb2.Run") -> None:
    document = run_document(run)
    if output is not Output.TABLE:
        print_object(output, {**document, "plan": plan_document(run)}, [])
        return
    record = document["last_round"] or {}
    lines: list[tuple[str, Any]] = [
        ("run", document["run"]),
        ("name", document["name"]),
        ("state", document["state"]),
        ("reason", document["reason"]),
        ("rounds finished", f"{document['round']} of {document['rounds']}"),
        ("phase", document["phase"]),
        ("strategy", document["strategy"]),
        ("sites", document["sites"]),
        ("accuracy", percent(record.get("accuracy"))),
        ("balanced accuracy", percent(record.get("balanced_accuracy"))),
        ("best round", document["best_round"]),
        ("submitted", f"{document['submitted_at']} by {document['submitted_by']}"),
        ("finished", document["finished_at"]),
    ]
    if document["models_dropped"]:
        lines.append(("models dropped", f"rounds {document['models_dropped']}"))
    lines += [(f"missed in round {m['round']}", m["sites"]) for m in document["missed"]]
    for site in document["progress"]:
        count = f" {site['done']}/{site['total']}" if site["total"] else ""
        why = f": {site['reason']}" if site["reason"] else ""
        lines.append((f"site {site['site']}", f"{site['stage']}{count}{why}"))
    print_object(output, document, lines)


def _refused(record: dict[str, Any]) -> str:
    """How many impressions sites refused to train on, all sites together; "–" if none checked any."""
    from fedcore.impression_check import ImpressionCheck

    checks = (record.get("impressions", {}).get("checks") or {}).values()
    return str(sum(ImpressionCheck.model_validate(found).num_refused for found in checks)) if checks else "–"


def _round_row(record: dict[str, Any]) -> dict[str, Any]:
    from fedcore.update_verdict import gate_summary

    counts = [record[key] for key in ("expected", "registered", "started", "reported", "aggregated")]
    return {
        "round": record["round"],
        "accuracy": percent(record.get("accuracy")),
        "balanced": percent(record.get("balanced_accuracy")),
        "counts": "/".join(map(str, counts)),
        "gate": gate_summary(record.get("gate") or {}),
        "made": record.get("impressions", {}).get("made", 0),
        "refused": _refused(record),
        "time": format_duration(record.get("seconds", 0.0)),
        "up": format_bytes(record.get("bytes_up", 0)),
        "down": format_bytes(record.get("bytes_down", 0)),
    }
