"""`fedserver`: make a coordinator's home, check it, serve it."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fedcore.program import report_findings, run_program
from fedserver.ca_commands import HomeOption, ca_app
from fedserver.recovery_commands import add_to

app = typer.Typer(
    help="The coordinator of a fedimpres federation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.add_typer(ca_app, name="ca")
add_to(app)


@app.command()
def init(
    home: HomeOption,
    name: Annotated[str, typer.Option(help="The federation's name; it stands in every certificate.")],
    host: Annotated[str, typer.Option(help="The name or address that sites dial.")],
    port: Annotated[int, typer.Option(help="Port for sites and operators.", min=1, max=65535)] = 8443,
    enroll_port: Annotated[int, typer.Option(help="Port for enrolment.", min=1, max=65535)] = 8444,
    offline_ca: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the root's key, which is not left on this machine; absent or empty, outside the home.",
            file_okay=False,
        ),
    ] = None,
) -> None:
    """Make a federation: root and issuing CA, coordinator certificate, first operator credential,
    configuration.
    """
    from fedserver.initialise import initialise

    made = initialise(
        home,
        name=name,
        host=host,
        port=port,
        enroll_port=enroll_port,
        now=datetime.now(UTC),
        offline_ca=offline_ca,
    )
    root_key = (offline_ca or made.home.pki) / "root.key"
    advice = (
        f"{root_key} is on this machine still: take {offline_ca} away, and keep a copy in another safe place."
        if offline_ca
        else f"{root_key} is not needed to serve: keep it offline, and back it up."
    )
    typer.echo(f"""\
Federation {name} is ready in {home}.
  coordinator     {made.coordinator}
  CA fingerprint  {made.ca_fingerprint}

Next:
  1. fedserver serve --home {home}
  2. copy {made.home.operator} to the operator's machine, then there:
     fedctl context add {name} --credential ./{made.home.operator.name}
  3. for each site:  fedctl enroll token create --site SITE

{advice}""")


@app.command()
def serve(
    home: HomeOption,
    lifeline: Annotated[
        int | None, typer.Option(hidden=True, help="Descriptor whose end of file ends the program.")
    ] = None,
) -> None:
    """Serve a federation until SIGTERM or Ctrl-C."""
    from fedserver.app import run

    raise typer.Exit(run(home, lifeline))


@app.command()
def preflight(home: HomeOption) -> None:
    """Check what `serve` needs on this machine: configuration, certificates, database, name, ports, disk, device. One
    line each; exits with 1 if one fails.
    """
    from fedserver.preflight import preflight as check_machine

    report_findings(check_machine(home, datetime.now(UTC)))


@app.command("check-config")
def check_config(home: HomeOption) -> None:
    """Check configuration, certificates and database of a home, without serving it."""
    from fedserver.checks import check_home

    for line in check_home(home, datetime.now(UTC)):
        typer.echo(line)


@app.command()
def operator(
    home: HomeOption,
    operator_id: Annotated[str, typer.Option("--id", help="The operator's name.")],
    out: Annotated[Path, typer.Option(help="Folder for the credential; must not exist.", file_okay=False)],
) -> None:
    """Make a credential for an operator: another one, or one whose certificate has ended or whose key is lost."""
    from fedserver.operators import make_operator

    until = make_operator(home, operator_id, out, datetime.now(UTC))
    typer.echo(
        f"Credential of operator {operator_id} in {out}, until {until:%Y-%m-%d}.\nNext, on that operator's machine: "
        f"fedctl context add NAME --credential {out}"
    )


@app.command()
def version() -> None:
    """Print the version."""
    from fedcore.version import software_version

    typer.echo(f"fedserver {software_version()}")


def main() -> None:
    """Entry point of the script `fedserver`."""
    run_program(app)


if __name__ == "__main__":
    main()
