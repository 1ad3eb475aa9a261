"""fedctl run plan: what a plan would meet and cost, before it is submitted."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcore.errors import PlanError
from fedctl.admin import open_admin
from fedctl.durations import format_bytes, format_duration
from fedctl.render import Column, Output, OutputOption, note, print_json, print_object, print_table

if TYPE_CHECKING:
    from fedcore.plan_forecast import PlanForecast, SiteForecast

DEGRADED = 8
UNKNOWN = "not measured yet"


def plan(
    ctx: typer.Context,
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN.toml", help="The plan, a TOML file.")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Try a plan without running it: which sites fit and why others don't, bytes, seconds as measured, disk, oddities.

    Changes nothing. Exit code: 0 all expected sites fit, 8 it would start without some, 1 it can't start as things are.
    """
    from fedcore.plan import load_plan
    from fedcore.plan_forecast import PlanForecast
    from fedcore.v1 import operations_pb2

    checked = load_plan(plan_file)
    initial = checked.training.initial
    if (
        initial is not None
        and initial.endswith(".safetensors")
        and not (plan_file.parent / initial).is_file()
    ):
        raise PlanError(f"{plan_file}: training.initial: no such file: {plan_file.parent / initial}")
    with open_admin(ctx) as admin:
        request = operations_pb2.CheckPlanRequest(plan_toml=plan_file.read_text(encoding="utf-8"))
        reply = admin.call(lambda _: admin.operations.CheckPlan, request)
    found = PlanForecast.model_validate_json(reply.forecast_json)
    if output is Output.TABLE:
        _show(found)
    else:
        print_json(found.model_dump(mode="json"), compact=output is Output.JSONL)
    if found.blocked:
        raise typer.Exit(1)
    raise typer.Exit(0 if found.fitting == len(found.sites) else DEGRADED)


def _show(found: "PlanForecast") -> None:
    columns = [
        Column("SITE", "site"), Column("FITS", "fits"), Column("IMAGES", "images", True),
        Column("UP", "up", True), Column("DOWN", "down", True), Column("UP IN ALL", "total_up", True),
        Column("DOWN IN ALL", "total_down", True), Column("TRAINING", "training", True),
        Column("TRANSFER", "transfer", True), Column("WHY NOT", "why", style="yellow"),
    ]  # fmt: skip
    print_table([_row(site) for site in found.sites], columns)
    print()
    lines: list[tuple[str, Any]] = [
        ("sites", f"{found.fitting} of {len(found.sites)} fit, at least {found.min_sites} needed"),
        ("a model", format_bytes(found.sizes.model)),
        ("an update", format_bytes(found.sizes.update)),
        ("impressions", format_bytes(found.sizes.impressions) if found.sizes.impressions else "none"),
        ("strategy's state", format_bytes(found.sizes.state) if found.sizes.state else "none"),
        *(
            (f"coordinator, {name}", format_duration(seconds))
            for name, seconds in found.coordinator_s.items()
        ),
        ("a round", _time(found.round_s)),
        (f"{found.rounds} rounds", _time(found.run_s)),
        (
            "disk at the coordinator",
            f"{format_bytes(found.disk_peak_bytes)}, {format_bytes(found.disk_kept_bytes)} of it kept; "
            f"{format_bytes(found.disk_free_bytes)} free",
        ),
    ]
    if found.quota_room_bytes is not None:
        lines.append(("storage quota", f"leaves it {format_bytes(max(0, found.quota_room_bytes))}"))
    lines += [(UNKNOWN, what) for what in found.not_measured]
    lines += [("waits for", run) for run in found.waits_for]
    lines += [("odd", text) for text in found.odd]
    print_object(Output.TABLE, {}, lines)
    note(f"it can't start: {found.blocked}" if found.blocked else "it could start; nothing was changed")


def _row(site: "SiteForecast") -> dict[str, Any]:
    return {
        "site": site.site,
        "fits": site.fits,
        "images": site.num_examples,
        "up": format_bytes(site.bytes_up),
        "down": format_bytes(site.bytes_down),
        "total_up": format_bytes(site.total_bytes_up),
        "total_down": format_bytes(site.total_bytes_down),
        "training": _time(site.training_s),
        "transfer": _time(site.transfer_s),
        "why": site.why,
    }


def _time(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else format_duration(seconds)
