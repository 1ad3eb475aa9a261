"""fedctl enroll: let sites in."""

from typing import Annotated

import typer

from fedctl.admin import open_admin
from fedctl.durations import format_duration, parse_duration
from fedctl.render import Output, OutputOption, note, print_object

app = typer.Typer(no_args_is_help=True, help="Let sites in.")
token_app = typer.Typer(no_args_is_help=True, help="Single-use enrolment tokens.")
app.add_typer(token_app, name="token")


@token_app.command("create")
def create(
    ctx: typer.Context,
    site: Annotated[str, typer.Option("--site", help="Name of the site that may enrol with it.")],
    ttl: Annotated[str, typer.Option("--ttl", help="How long it is valid: 90s, 15m, 2h.")] = "15m",
    output: OutputOption = Output.TABLE,
) -> None:
    """Create a single-use token for one site. Hand it over by a safe way, apart from the fingerprint."""
    from fedcore.v1 import admin_pb2

    ttl_s = parse_duration(ttl)
    with open_admin(ctx) as admin:
        reply = admin.call(
            lambda stub: stub.CreateToken, admin_pb2.CreateTokenRequest(site=site, ttl_s=ttl_s)
        )
    document = {
        "token": reply.token,
        "ca_fingerprint": reply.ca_fingerprint,
        "coordinator": reply.coordinator,
        "expires_at": reply.expires_at,
    }
    if output is not Output.TABLE:
        print_object(output, document, [])
        return
    # The command stands alone on stdout, unwrapped, so that it can be copied or piped.
    note(f"token for '{site}', valid for {format_duration(ttl_s)} (until {reply.expires_at}); at the site:")
    print(
        f"fedagent enroll --home DIR --coordinator {reply.coordinator} "
        f"--token {reply.token} --ca-fingerprint {reply.ca_fingerprint}"
    )
