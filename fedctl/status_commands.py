"""fedctl status, auth whoami, version."""

import typer

from fedctl.admin import open_admin
from fedctl.documents import status_document
from fedctl.durations import format_bytes, format_duration
from fedctl.render import Output, OutputOption, note, print_object
from fedctl.role_commands import can_i
from fedctl.site_commands import print_sites

auth_app = typer.Typer(no_args_is_help=True, help="Who am I to the coordinator.")


def status(ctx: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """Show the coordinator, its sites, what runs, and what is not as it should be."""
    from fedcore.v1 import admin_pb2

    with open_admin(ctx) as admin:
        reply = admin.call(lambda stub: stub.GetStatus, admin_pb2.GetStatusRequest())
    document = status_document(reply)
    if output is not Output.TABLE:
        print_object(output, document, [])
        return
    connected = sum(site.connected for site in reply.sites)
    lines: list[tuple[str, object]] = [
        ("federation", reply.federation),
        ("coordinator", f"version {reply.software_version}, up {format_duration(reply.uptime_s)}"),
        (
            "storage",
            f"{format_bytes(reply.artifact_bytes)} of artifacts, {format_bytes(reply.free_bytes)} free",
        ),
        ("sites", f"{connected} of {len(reply.sites)} connected"),
    ]
    for run in reply.active_runs:
        why = f": {run.reason}" if run.reason else ""
        lines.append(
            (f"run {run.run}", f"{run.name} {run.state} round {run.round}/{run.rounds} {run.phase}{why}")
        )
    if not reply.active_runs:
        lines.append(("runs", "none active"))
    lines += [("problem", problem) for problem in reply.problems]
    print_object(output, document, lines)
    if reply.sites:
        print()
        print_sites(output, document["sites"])


@auth_app.command("whoami")
def whoami(ctx: typer.Context, output: OutputOption = Output.TABLE) -> None:
    """Show the identity and role that the coordinator reads from this operator's certificate."""
    from fedcore.v1 import admin_pb2

    with open_admin(ctx) as admin:
        reply = admin.call(lambda stub: stub.WhoAmI, admin_pb2.WhoAmIRequest())
    document = {
        "federation": reply.federation,
        "role": reply.role,
        "roles": list(reply.roles),
        "id": reply.id,
        "serial": reply.serial,
        "not_after": reply.not_after,
    }
    print_object(output, document, [(key.replace("_", " "), value) for key, value in document.items()])


auth_app.command("can-i")(can_i)


def version(output: OutputOption = Output.TABLE) -> None:
    """Show the version of this program and of the protocol's parts."""
    import platform
    from importlib.metadata import version as installed

    document = {
        "version": installed("fedimpres"),
        "python": platform.python_version(),
        "grpcio": installed("grpcio"),
    }
    if output is Output.TABLE:
        print(f"fedctl {document['version']}")
        note(f"python {document['python']}, grpcio {document['grpcio']}")
    else:
        print_object(output, document, [])
