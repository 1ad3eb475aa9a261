"""A run as people see it: the live view of `run watch`, and the one-line form of each change."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fedctl.durations import format_duration
from fedctl.render import percent, plain, sparkline

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fedcore.v1 import admin_pb2

STATE_STYLE = {
    "RUNNING": "bold cyan", "WAITING": "yellow", "QUEUED": "yellow", "PAUSED": "yellow",
    "DONE": "bold green", "DEGRADED": "bold yellow", "FAILED": "bold red", "ABORTED": "bold red",
}  # fmt: skip
_STAGE_STYLE = {
    "failed": "red",
    "absent": "red",
    "let go": "red",
    "training": "cyan",
    "recalibrating": "cyan",
    "evaluating": "cyan",
}
# Sites whose reason a line of `watch` tells.
_REASONS = 3
_HISTORY_ROUNDS = 8


def run_renderable(
    run: "admin_pb2.Run", history: Sequence[dict[str, Any]], now: datetime, connection: str = ""
) -> "RenderableType":
    """The live view: header, a row per site, accuracy so far.

    `history` holds round records, oldest first; `connection` says what is wrong with the connection, if
    anything.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_header(run, now)]
    if connection:
        parts.append(Text(connection, style="yellow"))
    parts += [Text(""), _sites(run, history)]
    if history:
        parts += [Text(""), _rounds(history)]
    return Group(*parts)


def change_line(run: "admin_pb2.Run") -> str:
    """A run in one line without its progress bars: equal lines mean that nothing worth telling changed."""
    counts: dict[str, int] = {}
    for site in run.progress:
        counts[site.stage] = counts.get(site.stage, 0) + 1
    parts = [f"{run.run} {run.state}", f"round {run.round}/{run.rounds}"]
    if run.phase:
        parts.append(run.phase)
    if counts:
        parts.append(", ".join(f"{count} {stage}" for stage, count in sorted(counts.items())))
    if reasons := [f"{site.site} {site.reason}" for site in run.progress if site.reason]:
        more = f" and {len(reasons) - _REASONS} more" if len(reasons) > _REASONS else ""
        parts.append("; ".join(reasons[:_REASONS]) + more)
    if run.last_round_json:
        record = json.loads(run.last_round_json)
        parts.append(f"accuracy {percent(record.get('accuracy'))}")
    if run.reason:
        parts.append(run.reason)
    return " | ".join(parts)


def stage_line(run: "admin_pb2.Run") -> str:
    """A run in a few words: state, round, phase, accuracy so far."""
    record = json.loads(run.last_round_json) if run.last_round_json else {}
    accuracy = f"  accuracy {percent(record['accuracy'])}" if record.get("accuracy") is not None else ""
    phase = f"  {run.phase}" if run.state == "RUNNING" else ""
    return f"{run.state}  {run.round} of {run.rounds} rounds{phase}{accuracy}"


def since(moment: str, now: datetime) -> str:
    """How long ago an RFC 3339 moment was; empty if there is none."""
    if not moment:
        return ""
    then = datetime.fromisoformat(moment)
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    return format_duration(max(0.0, (now - then).total_seconds()))


def _header(run: "admin_pb2.Run", now: datetime) -> "RenderableType":
    from rich.text import Text

    text = Text()
    text.append(f"{run.name} ", style="bold")
    text.append(f"{run.run}  {run.strategy}\n", style="dim")
    text.append(run.state, style=STATE_STYLE.get(run.state, "bold"))
    text.append(
        f"  round {min(run.round + 1, run.rounds) if run.state == 'RUNNING' else run.round}/{run.rounds}"
    )
    if run.phase:
        text.append(f"  {run.phase}")
        if ago := since(run.phase_since, now):
            text.append(f" for {ago}", style="dim")
    if run.reason:
        text.append(f"\n{run.reason}", style="italic")
    if run.missed:
        rounds = ", ".join(f"{m.round} ({', '.join(m.sites)})" for m in run.missed[-5:])
        text.append(f"\nrounds that missed a site: {rounds}", style="yellow")
    return text


def _sites(run: "admin_pb2.Run", history: Sequence[dict[str, Any]]) -> "RenderableType":
    from rich.box import SIMPLE_HEAD
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    figures = history[-1].get("sites", {}) if history else {}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("SITE")
    table.add_column("STAGE", min_width=10)
    table.add_column("", width=20)
    for heading, width in (("LOSS", 8), ("IMAGES/S", 8), ("ACCURACY", 8)):
        table.add_column(heading, justify="right", min_width=width)
    table.add_column("")
    for site in run.progress:
        bar: RenderableType = ""
        if site.total > 0:
            bar = ProgressBar(total=site.total, completed=min(site.done, site.total), width=20)
        accuracy = figures.get(site.site, {}).get("accuracy")
        table.add_row(
            plain(site.site),
            Text(site.stage, style=_STAGE_STYLE.get(site.stage, "")),
            bar,
            f"{site.loss:.4f}" if site.loss else "",
            f"{site.images_per_s:,.0f}" if site.images_per_s else "",
            percent(accuracy) if accuracy is not None else "",
            Text(site.reason, style="dim"),
        )
    return table


def _rounds(history: Sequence[dict[str, Any]]) -> "RenderableType":
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    accuracies = [record.get("accuracy") for record in history]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("ROUND", "ACCURACY", "BALANCED", "LOSS", "SITES", "IMPRESSIONS", "TIME"):
        table.add_column(heading, justify="right")
    for record in history[-_HISTORY_ROUNDS:]:
        loss = record.get("loss")
        table.add_row(
            str(record["round"]),
            percent(record.get("accuracy")),
            percent(record.get("balanced_accuracy")),
            f"{loss:.4f}" if loss is not None else "–",
            f"{record.get('aggregated')}/{record.get('expected')}",
            str(record.get("impressions", {}).get("made") or "–"),
            format_duration(record.get("seconds", 0.0)),
        )
    return Group(Text.assemble(("accuracy ", "dim"), sparkline(accuracies[-60:])), table)
