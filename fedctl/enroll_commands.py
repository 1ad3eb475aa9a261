"""fedctl enroll: let sites and operators in."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcore.errors import ConflictError, FingerprintError, NotFoundError, UsageError
from fedctl.admin import Admin, open_admin
from fedctl.durations import format_duration, parse_duration
from fedctl.render import Column, Output, OutputOption, note, print_object, print_rows

if TYPE_CHECKING:
    from fedcore.v1 import membership_pb2

app = typer.Typer(no_args_is_help=True, help="Let sites and operators in.")
token_app = typer.Typer(no_args_is_help=True, help="Single-use enrolment tokens.")
request_app = typer.Typer(no_args_is_help=True, help="Sites that ask to be let in, without a token.")
app.add_typer(token_app, name="token")
app.add_typer(request_app, name="request")

COLUMNS = [
    Column("SITE", "site"), Column("KEY FINGERPRINT", "key_fingerprint"), Column("STATE", "state"),
    Column("FROM", "address"), Column("ASKED", "requested_at"), Column("BY", "decided_by"),
]  # fmt: skip

RequestArgument = Annotated[
    str,
    typer.Argument(
        help="The key's fingerprint, or a unique beginning of it; or the name of the one site that asks."
    ),
]


@token_app.command("create")
def create(
    ctx: typer.Context,
    site: Annotated[str, typer.Option("--site", help="Name of the site that may enrol with it.")] = "",
    operator: Annotated[
        str,
        typer.Option("--operator", help="Name of the operator who may enrol with it. Takes the role owner."),
    ] = "",
    roles: Annotated[
        list[str] | None,
        typer.Option("--role", help="With --operator: a role to grant; may be given several times."),
    ] = None,
    ttl: Annotated[str, typer.Option("--ttl", help="How long it is valid: 90s, 15m, 2h.")] = "15m",
    output: OutputOption = Output.TABLE,
) -> None:
    """Create a single-use token for one site or one operator. Hand it over by a safe way, apart from the fingerprint."""
    from fedcore.v1 import admin_pb2, membership_pb2

    if bool(site) == bool(operator):
        raise UsageError("`enroll token create` needs either --site or --operator")
    if roles and site:
        raise UsageError("--role goes with --operator only: a site is let in as a site")
    ttl_s = parse_duration(ttl)
    with open_admin(ctx) as admin:
        if site:
            reply = admin.call(
                lambda stub: stub.CreateToken, admin_pb2.CreateTokenRequest(site=site, ttl_s=ttl_s)
            )
        else:
            request = membership_pb2.CreateOperatorTokenRequest(
                operator=operator, ttl_s=ttl_s, roles=roles or ()
            )
            reply = admin.call(lambda _: admin.membership.CreateOperatorToken, request)
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
    where = "at the site" if site else "on that operator's machine"
    note(
        f"token for '{site or operator}', valid for {format_duration(ttl_s)} (until {reply.expires_at}); {where}:"
    )
    command = "fedagent enroll --home DIR" if site else "fedctl context enroll NAME"
    print(
        f"{command} --coordinator {reply.coordinator} "
        f"--token {reply.token} --ca-fingerprint {reply.ca_fingerprint}"
    )


@request_app.command("list")
def list_requests(
    ctx: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="Also those that were decided lately.")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """List the sites that ask to be let in, the newest first."""
    with open_admin(ctx) as admin:
        rows = [_document(one) for one in _requests(admin, state="" if everything else "waiting")]
    print_rows(
        output, "requests", rows, COLUMNS, empty="nobody asks to be let in; --all shows decided requests"
    )


@request_app.command("show")
def show(ctx: typer.Context, request: RequestArgument, output: OutputOption = Output.TABLE) -> None:
    """Show one request, whether it waits or was decided lately."""
    with open_admin(ctx) as admin:
        document = _document(_one(admin, request))
    print_object(output, document, [(key.replace("_", " "), value) for key, value in document.items()])


@request_app.command("approve")
def approve(
    ctx: typer.Context,
    request: RequestArgument,
    fingerprint: Annotated[
        str, typer.Option("--fingerprint", help="What the site's people read out; refused if it differs.")
    ] = "",
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Don't ask; off a terminal this or --fingerprint is needed.")
    ] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Let a site in. Compare the fingerprint with what the site's people see, by another way than the network."""
    from fedcore.v1 import membership_pb2

    with open_admin(ctx) as admin:
        found = _one(admin, request, waiting=True)
        if fingerprint:
            _compare(fingerprint, found)
        elif not yes:
            _ask_to_approve(found)
        decision = membership_pb2.DecideEnrollmentRequest(key_fingerprint=found.key_fingerprint)
        reply = admin.call(lambda _: admin.membership.ApproveEnrollment, decision)
    print_object(output, _document(reply), _lines(reply))
    note(f"site {reply.site} fetches its certificate by itself; undo: fedctl cert revoke {reply.serial[:12]}")


@request_app.command("deny")
def deny(
    ctx: typer.Context,
    request: RequestArgument,
    reason: Annotated[str, typer.Option("--reason", help="Why; the site's people read it.")] = "",
    output: OutputOption = Output.TABLE,
) -> None:
    """Refuse a site. It may ask again, with another key."""
    from fedcore.v1 import membership_pb2

    with open_admin(ctx) as admin:
        found = _one(admin, request, waiting=True)
        decision = membership_pb2.DecideEnrollmentRequest(
            key_fingerprint=found.key_fingerprint, reason=reason
        )
        reply = admin.call(lambda _: admin.membership.DenyEnrollment, decision)
    print_object(output, _document(reply), _lines(reply))


def _compare(fingerprint: str, found: "membership_pb2.EnrollmentRequest") -> None:
    got = fingerprint.strip().lower().removeprefix("sha256:").replace(":", "").replace(" ", "")
    if got != found.key_fingerprint:
        raise FingerprintError(
            f"the request of {found.site} is of the key {found.key_fingerprint}, not of {got[:80]!r}; nothing was approved",
            hint="somebody else may ask under that name: fedctl enroll request list; deny what is not the site's",
        )


def _ask_to_approve(found: "membership_pb2.EnrollmentRequest") -> None:
    if not sys.stdin.isatty():
        raise UsageError(
            "`enroll request approve` can't ask for confirmation off a terminal",
            hint="add --fingerprint with what the site's people read out, or --yes",
        )
    note(
        f"site             {found.site}\nkey fingerprint  {found.key_fingerprint}\nfrom             {found.address}"
    )
    if found.enrolled_at:
        note(f"A site of that name is enrolled since {found.enrolled_at}: this would be its new credential.")
    if not typer.confirm("Is this what the site's people read out, and shall it be let in?", err=True):
        note("nothing done")
        raise typer.Exit(1)


def _requests(admin: Admin, **filters: str) -> "list[membership_pb2.EnrollmentRequest]":
    from fedcore.v1 import membership_pb2

    reply = admin.call(
        lambda _: admin.membership.ListEnrollments, membership_pb2.ListEnrollmentsRequest(**filters)
    )
    return list(reply.requests)


def _one(admin: Admin, text: str, *, waiting: bool = False) -> "membership_pb2.EnrollmentRequest":
    """The request that `text` names; with `waiting`, one that waits is meant where others were decided."""
    rows = _requests(admin)
    found = [one for one in rows if text in ("", one.site) or one.key_fingerprint.startswith(text.lower())]
    if waiting and len(found) > 1:
        found = [one for one in found if one.state == "waiting"]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConflictError(
            f"{len(found)} requests are of '{text}', expected one",
            hint="name the one you mean by its key's fingerprint: fedctl enroll request list --all",
        )
    raise NotFoundError(f"no request of '{text}'", hint="fedctl enroll request list --all shows them")


def _document(message: "membership_pb2.EnrollmentRequest") -> dict[str, Any]:
    return {
        "site": message.site,
        "key_fingerprint": message.key_fingerprint,
        "address": message.address,
        "state": message.state,
        "requested_at": message.requested_at,
        "expires_at": message.expires_at,
        "decided_at": message.decided_at or None,
        "decided_by": message.decided_by or None,
        "reason": message.reason or None,
        "serial": message.serial or None,
        "enrolled_at": message.enrolled_at or None,
    }


def _lines(message: "membership_pb2.EnrollmentRequest") -> list[tuple[str, Any]]:
    return [("site", message.site), ("state", message.state), ("key fingerprint", message.key_fingerprint)]
