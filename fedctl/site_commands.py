"""fedctl site: the sites of the federation."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcore.errors import CallTimeoutError, ConflictError, NotFoundError, UsageError
from fedctl.admin import Admin, open_admin
from fedctl.asking import YesOption, agree, check_can_ask
from fedctl.completion import SiteArgument
from fedctl.documents import site_document
from fedctl.durations import parse_duration
from fedctl.render import Column, Output, OutputOption, minute, note, print_object, print_rows

if TYPE_CHECKING:
    from fedcore.v1 import admin_pb2

app = typer.Typer(no_args_is_help=True, help="The sites of the federation.")

COLUMNS = [
    Column("SITE", "site"), Column("CONNECTED", "connected"), Column("STANDING", "standing"),
    Column("ACTIVITY", "doing", wraps=True), Column("LAST SEEN", "seen"),
    Column("IMAGES", "num_examples", True), Column("VERSION", "software_version"),
    Column("CERTIFICATE", "certificate"),
]  # fmt: skip
# From the coordinator to the agent and back; and with the way from here to the coordinator.
PING_COLUMNS = [
    Column("SITE", "site"), Column("NUMBER", "number", True), Column("AGENT", "agent", True),
    Column("TOTAL", "total", True),
]  # fmt: skip
_POLL_S = 1.0

ReasonOption = Annotated[
    str, typer.Option("--reason", help="Why; the site's people and other operators read it.")
]


@app.command("list")
def list_sites(
    ctx: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="Also those that were removed.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """List the enrolled sites and what each does now."""
    from fedcore.v1 import admin_pb2

    with open_admin(ctx) as admin:
        request = admin_pb2.ListSitesRequest(removed=everything)
        reply = admin.call(lambda stub: stub.ListSites, request)
    print_sites(output, [site_document(site) for site in reply.sites])


@app.command("show")
def show(ctx: typer.Context, site: SiteArgument, output: OutputOption = Output.TABLE) -> None:
    """Show one site: its connection, what it does, and what operators decided about it."""
    with open_admin(ctx) as admin:
        message = _get(admin, site)
    _print_site(output, message)


@app.command("enable")
def enable(
    ctx: typer.Context, site: SiteArgument, reason: ReasonOption = "", output: OutputOption = Output.TABLE
) -> None:
    """Let runs ask a site again, after `drain` or `disable`. A run under way asks it from the next round on."""
    from fedcore.v1 import sites_pb2

    with open_admin(ctx) as admin:
        request = sites_pb2.ChangeSiteRequest(site=site, reason=reason)
        message = admin.call(lambda _: admin.sites.EnableSite, request)
    _print_site(output, message)


@app.command("disable")
def disable(
    ctx: typer.Context, site: SiteArgument, reason: ReasonOption = "", output: OutputOption = Output.TABLE
) -> None:
    """Keep a site out until `enable`: a run under way lets it go at once and names it, its agent is refused.

    Runs that begin later don't expect it. `drain` is the gentler way.
    """
    from fedcore.v1 import sites_pb2

    with open_admin(ctx) as admin:
        request = sites_pb2.ChangeSiteRequest(site=site, reason=reason)
        message = admin.call(lambda _: admin.sites.DisableSite, request)
    _print_site(output, message)


@app.command("drain")
def drain(
    ctx: typer.Context,
    site: SiteArgument,
    reason: ReasonOption = "",
    wait: Annotated[bool, typer.Option("--wait", help="Return when it has no work any more.")] = False,
    timeout: Annotated[
        str | None, typer.Option(help="With --wait, give up after so long: 90s, 15m, 2h (exit code 5).")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Let a site finish the round it works for, then give it no work until `enable`; its agent stays connected."""
    from fedcore.v1 import sites_pb2

    if timeout is not None and not wait:
        raise UsageError("--timeout goes with --wait only")
    timeout_s = parse_duration(timeout) if timeout else None
    with open_admin(ctx) as admin:
        request = sites_pb2.ChangeSiteRequest(site=site, reason=reason)
        message = admin.call(lambda _: admin.sites.DrainSite, request)
        if wait:
            message = _wait_drained(admin, site, timeout_s)
    _print_site(output, message)


@app.command("remove")
def remove(
    ctx: typer.Context,
    site: SiteArgument,
    reason: ReasonOption = "",
    force: Annotated[
        bool, typer.Option("--force", help="Also while a run expects it; the run goes on without it.")
    ] = False,
    yes: YesOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Take a site out of the federation: its certificates are revoked, its open tokens void; its history stays.

    It comes back with a new token only.
    """
    from fedcore.v1 import sites_pb2

    check_can_ask("site remove", yes=yes)
    agree(f"Remove site {site} and revoke its certificates?", yes=yes)
    with open_admin(ctx) as admin:
        request = sites_pb2.RemoveSiteRequest(site=site, reason=reason, force=force)
        reply = admin.call(lambda _: admin.sites.RemoveSite, request)
    document = {**site_document(reply.site), "revoked": reply.revoked}
    lines = [
        ("site", document["site"]),
        ("standing", _standing(document)),
        ("certificates revoked", reply.revoked),
    ]
    print_object(output, document, lines)


@app.command("ping")
def ping(
    ctx: typer.Context,
    site: SiteArgument,
    count: Annotated[int, typer.Option(min=1, max=1000, help="How often.")] = 3,
    output: OutputOption = Output.TABLE,
) -> None:
    """Measure the round trip to a site's agent, over the connection that it holds. Exit code 3 if it is away."""
    from fedcore.v1 import sites_pb2

    rows: list[dict[str, Any]] = []
    with open_admin(ctx) as admin:
        for number in range(1, count + 1):
            began = time.perf_counter()
            reply = admin.call(lambda _: admin.sites.PingSite, sites_pb2.PingSiteRequest(site=site))
            total_s = time.perf_counter() - began
            rows.append({"site": site, "number": number, "agent_s": reply.round_trip_s, "total_s": total_s})
    if output is Output.TABLE:
        for row in rows:
            row["agent"], row["total"] = (f"{1e3 * row[key]:.1f} ms" for key in ("agent_s", "total_s"))
    print_rows(output, "pings", rows, PING_COLUMNS, empty="")


@app.command("logs")
def logs(
    ctx: typer.Context,
    site: SiteArgument,
    lines: Annotated[int, typer.Option("--lines", "-n", min=1, max=1000, help="At most so many.")] = 100,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show the last lines of a site's agent's own log, if the site's policy shares them (share_logs).

    They hold no secret, no image's name and no label: what could stays at the site, and is named as left out.
    """
    from fedcore.v1 import sites_pb2

    with open_admin(ctx) as admin:
        request = sites_pb2.ReadSiteLogRequest(site=site, lines=lines)
        reply = admin.call(lambda _: admin.sites.ReadSiteLog, request)
    rows = [
        {"at": line.at, "level": line.level, "event": line.event, "fields": dict(sorted(line.fields.items()))}
        for line in reply.lines
    ]
    if output is not Output.TABLE:
        print_rows(output, "lines", rows, [], empty="")
        return
    for line in reply.lines:
        fields = "".join(f"  {key}={value}" for key, value in sorted(line.fields.items()))
        print(f"{line.at[:23]}  {line.level:7}  {line.event}{fields}")
    if not rows:
        note(f"the agent of {site} has logged nothing since it started")


def print_sites(output: Output, rows: list[dict[str, Any]]) -> None:
    """Show sites as a table or as documents."""
    if output is Output.TABLE:
        rows = [
            {
                **row,
                "doing": row["unavailable_reason"] or row["activity"],
                "seen": "now" if row["connected"] else minute(row["last_seen"]),
                "certificate": f"to {row['certificate_not_after'][:10]}"
                if row["certificate_not_after"]
                else "",
            }
            for row in rows
        ]
    print_rows(output, "sites", rows, COLUMNS, empty="no sites; fedctl enroll token create --site SITE")


def _get(admin: Admin, site: str) -> "admin_pb2.Site":
    from fedcore.v1 import admin_pb2

    if not site:
        raise UsageError("an empty text is no site's name")
    reply = admin.call(lambda stub: stub.ListSites, admin_pb2.ListSitesRequest(site=site))
    if not reply.sites:
        raise NotFoundError(f"no site '{site}'", hint="fedctl site list shows the enrolled ones")
    return reply.sites[0]


def _wait_drained(admin: Admin, site: str, timeout_s: float | None) -> "admin_pb2.Site":
    """Ask until the site has no work. Raises CallTimeoutError, ConflictError if its standing is changed meanwhile."""
    began = time.monotonic()
    while (message := _get(admin, site)).standing == "draining":
        if timeout_s is not None and time.monotonic() - began > timeout_s:
            raise CallTimeoutError(
                f"site {site} still has work after {timeout_s:g} s: {message.activity}",
                hint="it stays draining; fedctl site show tells when it is drained",
            )
        time.sleep(_POLL_S)
    if message.standing != "drained":
        raise ConflictError(f"site {site} is {message.standing} now: somebody else decided")
    return message


def _print_site(output: Output, message: "admin_pb2.Site") -> None:
    document = site_document(message)
    hidden = {"enabled", "standing_since", "standing_by", "standing_reason"}
    lines: list[tuple[str, Any]] = [
        (key.replace("_", " "), _standing(document) if key == "standing" else value)
        for key, value in document.items()
        if key not in hidden
    ]
    print_object(output, document, lines)


def _standing(document: dict[str, Any]) -> str:
    """As people read it: disabled since 2026-03-01T12:00:00 by admin: MRI upgrade."""
    since, by, reason = (document[f"standing_{key}"] for key in ("since", "by", "reason"))
    text = str(document["standing"]) + (f" since {since[:19]}Z" if since else "")
    return text + (f" by {by}" if by else "") + (f": {reason}" if reason else "")
