"""fedctl role: what operators may do; fedctl auth can-i."""

from typing import Annotated, Any

import typer

from fedctl.admin import open_admin
from fedctl.render import Column, Output, OutputOption, minute, print_rows

app = typer.Typer(
    no_args_is_help=True,
    help="Roles of operators: viewer (reads), operator (submits and controls), auditor (audit log, impressions), "
    "owner (roles, CA).",
)

COLUMNS = [
    Column("OPERATOR", "operator"), Column("ROLE", "role"), Column("GRANTED", "granted_at"),
    Column("BY", "granted_by"),
]  # fmt: skip
ACTION_COLUMNS = [
    Column("ACTION", "action"),
    Column("ALLOWED", "allowed"),
    Column("TAKES", "roles", wraps=True),
]

OperatorArgument = Annotated[str, typer.Argument(help="Name of the operator, as in the certificate.")]
RoleArgument = Annotated[str, typer.Argument(help="viewer, operator, auditor or owner.")]


@app.command("grant")
def grant(
    ctx: typer.Context, operator: OperatorArgument, role: RoleArgument, output: OutputOption = Output.TABLE
) -> None:
    """Give an operator a role; it holds from its next call on. Takes the role owner."""
    from fedcore.v1 import access_pb2

    with open_admin(ctx) as admin:
        request = access_pb2.ChangeRoleRequest(operator=operator, role=role)
        reply = admin.call(lambda _: admin.access.GrantRole, request)
    _show(output, reply)


@app.command("revoke")
def revoke(
    ctx: typer.Context, operator: OperatorArgument, role: RoleArgument, output: OutputOption = Output.TABLE
) -> None:
    """Take a role away, from the operator's next call on; the last owner stays one. Takes the role owner."""
    from fedcore.v1 import access_pb2

    with open_admin(ctx) as admin:
        request = access_pb2.ChangeRoleRequest(operator=operator, role=role)
        reply = admin.call(lambda _: admin.access.RevokeRole, request)
    _show(output, reply)


@app.command("list")
def list_roles(
    ctx: typer.Context,
    operator: Annotated[str, typer.Option("--operator", help="Only this one's.")] = "",
    output: OutputOption = Output.TABLE,
) -> None:
    """List who has which role."""
    from fedcore.v1 import access_pb2

    with open_admin(ctx) as admin:
        reply = admin.call(lambda _: admin.access.ListRoles, access_pb2.ListRolesRequest(operator=operator))
    _show(output, reply)


def can_i(
    ctx: typer.Context,
    action: Annotated[str, typer.Argument(help="An action, run.submit say; all if not given.")] = "",
    output: OutputOption = Output.TABLE,
) -> None:
    """Say what this operator may do. Asked for one action, exit code 4 if it may not."""
    from fedcore.errors import PermissionDeniedError
    from fedcore.v1 import access_pb2

    with open_admin(ctx) as admin:
        reply = admin.call(lambda _: admin.access.CanI, access_pb2.CanIRequest(action=action))
    rows = [{"action": one.action, "allowed": one.allowed, "roles": list(one.roles)} for one in reply.answers]
    print_rows(output, "actions", rows, ACTION_COLUMNS, empty="no actions")
    if action and not rows[0]["allowed"]:
        raise PermissionDeniedError(
            f"you may not {action}: it is granted to {' or '.join(reply.answers[0].roles)}",
            hint="an owner grants roles: fedctl role grant OPERATOR ROLE",
        )


def _show(output: Output, reply: Any) -> None:
    rows = [
        {
            "operator": one.operator,
            "role": one.role,
            "granted_at": one.granted_at,
            "granted_by": one.granted_by,
        }
        for one in reply.grants
    ]
    if output is Output.TABLE:
        rows = [{**row, "granted_at": minute(row["granted_at"])} for row in rows]
    print_rows(output, "grants", rows, COLUMNS, empty="no roles")
