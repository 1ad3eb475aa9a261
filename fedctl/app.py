"""fedctl: the operator's command line. Data goes to stdout, progress and errors to stderr."""

import os
from typing import Annotated

import typer

from fedcore.program import run_program
from fedctl import (
    audit_commands,
    backup_commands,
    cert_commands,
    completion,
    context_commands,
    demo,
    enroll_commands,
    impression_commands,
    model_commands,
    role_commands,
    run_commands,
    server_commands,
    site_commands,
    status_commands,
)
from fedctl.contexts import config_dir
from fedctl.invocation import Invocation

app = typer.Typer(
    name="fedctl",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Operate a fedimpres federation.",
)
app.add_typer(context_commands.app, name="context")
app.add_typer(enroll_commands.app, name="enroll")
app.add_typer(cert_commands.app, name="cert")
app.add_typer(site_commands.app, name="site")
app.add_typer(run_commands.app, name="run")
app.add_typer(model_commands.app, name="model")
app.add_typer(impression_commands.app, name="impression")
app.add_typer(status_commands.auth_app, name="auth")
app.add_typer(role_commands.app, name="role")
app.add_typer(audit_commands.app, name="audit")
app.add_typer(server_commands.app, name="server")
app.add_typer(backup_commands.app, name="backup")
app.command("status")(status_commands.status)
app.command("demo")(demo.demo)
app.command("completion")(completion.completion)
app.command("version")(status_commands.version)


@app.callback()
def root(
    ctx: typer.Context,
    context: Annotated[
        str | None,
        typer.Option(
            "--context",
            envvar="FEDIMPRES_CONTEXT",
            help="Context to use instead of the current one.",
            autocompletion=completion.contexts,
        ),
    ] = None,
) -> None:
    """Operate a fedimpres federation."""
    ctx.obj = Invocation(config_dir(os.environ), context)


def main() -> None:
    """Entry point. Exits with the code of operations.md; an error is one line with its code, and a hint."""
    run_program(app)


if __name__ == "__main__":
    main()
