"""fedctl site: the sites of the federation."""

from typing import Any

import typer

from fedcore.errors import NotFoundError
from fedctl.admin import open_admin
from fedctl.completion import SiteArgument
from fedctl.documents import site_document
from fedctl.render import Column, Output, OutputOption, print_object, print_rows

app = typer.Typer(no_args_is_help=True, help="The sites of the federation.")

COLUMNS = [
    Column("SITE", "site"), Column("CONNECTED", "connected"), Column("ENABLED", "enabled"),
    Column("ACTIVITY", "doing"), Column("LAST SEEN", "last_seen"), Column("IMAGES", "num_examples", True),
    Column("DEVICE", "device"), Column("VERSION", "software_version"),
    Column("CERTIFICATE UNTIL", "certificate_not_after"),
]  # fmt: skip


@app.command("list")
def list_sites(ctx: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """List the enrolled sites and what each does now."""
    from fedcore.v1 import admin_pb2

    with open_admin(ctx) as admin:
        reply = admin.call(lambda stub: stub.ListSites, admin_pb2.ListSitesRequest())
    print_sites(output, [site_document(site) for site in reply.sites])


@app.command("show")
def show(
    ctx: typer.Context,
    site: SiteArgument,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show one site."""
    from fedcore.v1 import admin_pb2

    with open_admin(ctx) as admin:
        reply = admin.call(lambda stub: stub.ListSites, admin_pb2.ListSitesRequest(site=site))
    if not reply.sites:
        raise NotFoundError(f"no site '{site}'", hint="fedctl site list shows the enrolled ones")
    document = site_document(reply.sites[0])
    print_object(output, document, [(key.replace("_", " "), value) for key, value in document.items()])


def print_sites(output: Output, rows: list[dict[str, Any]]) -> None:
    """Show sites as a table or as documents."""
    if output is Output.TABLE:
        rows = [{**row, "doing": row["unavailable_reason"] or row["activity"]} for row in rows]
    print_rows(output, "sites", rows, COLUMNS, empty="no sites; fedctl enroll token create --site SITE")
