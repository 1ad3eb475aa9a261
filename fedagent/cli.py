"""`fedagent`: enrol a site and serve. What the site's own people do with it is in site_commands."""

import sys
from typing import Annotated

import typer

from fedagent.audit_commands import audit_app
from fedagent.impression_commands import impressions_app
from fedagent.model_commands import model_app
from fedagent.site_commands import DataOption, HomeOption, add_to
from fedcore.program import run_program

app = typer.Typer(
    help="A site's agent in a fedimpres federation. It dials out and never listens; images stay here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

add_to(app)
app.add_typer(audit_app, name="audit")
app.add_typer(impressions_app, name="impressions")
app.add_typer(model_app, name="model")


@app.command("enroll")
def enroll_command(
    home: HomeOption,
    coordinator: Annotated[str, typer.Option(help="HOST:PORT of the coordinator.")],
    ca_fingerprint: Annotated[str, typer.Option(help="SHA-256 of the federation's root certificate.")],
    token: Annotated[
        str | None,
        typer.Option(help="The enrolment token; '-' reads it from stdin.", envvar="FEDAGENT_TOKEN"),
    ] = None,
    request: Annotated[
        bool, typer.Option("--request", help="Without a token: ask to be let in, for an operator to approve.")
    ] = False,
    site: Annotated[str | None, typer.Option(help="With --request: the name to ask for.")] = None,
    enroll_port: Annotated[
        int, typer.Option(help="With --request: the coordinator's enrolment port.", min=1, max=65535)
    ] = 8444,
    wait_s: Annotated[
        float | None,
        typer.Option(
            "--wait",
            help="With --request: seconds to wait for the decision; until it is made by default.",
            min=0,
        ),
    ] = None,
    proxy: Annotated[str | None, typer.Option(help="HTTP CONNECT proxy, http://HOST:PORT.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the credential of an enrolled home.")
    ] = False,
) -> None:
    """Get this site's certificate, for a single-use token or by a request. The private key never leaves the site.

    A request may be interrupted: called again, the command goes on with the same key. Exit code 5 while it is not decided.
    """
    from fedagent.enroll import enroll
    from fedcore.errors import ConfigError

    if request == (token is not None) or request != (site is not None):
        raise ConfigError("enroll: expected either --token TOKEN, or --request with --site SITE")
    terms = {"coordinator": coordinator, "ca_fingerprint": ca_fingerprint}
    if token is not None:
        secret = sys.stdin.read() if token == "-" else token  # noqa: S105 - a file name's dash
        enrolled = enroll(home, token=secret, proxy=proxy, force=force, **terms)
    else:
        from fedagent.enroll_request import prepare_request, pursue_request

        opened = prepare_request(
            home, site=site or "", enroll_port=enroll_port, proxy=proxy, force=force, **terms
        )
        typer.echo(
            f"Key fingerprint of this site: {opened.fingerprint}\nRead it out to the operator, who compares it."
        )
        enrolled = pursue_request(
            home,
            opened,
            wait_s=wait_s,
            proxy=proxy,
            force=force,
            told=lambda text: typer.echo(text, err=True),
        )
    typer.echo(
        f"Site {enrolled.site} belongs to federation {enrolled.federation} (certificate until "
        f"{enrolled.not_after:%Y-%m-%d}).\nNext: say in {home / 'agent.toml'} where the images lie, then "
        f"fedagent serve --home {home}"
    )


@app.command()
def serve(
    home: HomeOption,
    data: DataOption = None,
    lifeline: Annotated[
        int | None, typer.Option(hidden=True, help="Descriptor whose end of file ends the program.")
    ] = None,
) -> None:
    """Take part in the federation until SIGTERM or Ctrl-C; reconnects by itself."""
    from fedagent.app import run

    raise typer.Exit(run(home, data, lifeline))


@app.command()
def version() -> None:
    """Print the version."""
    from fedcore.version import software_version

    typer.echo(f"fedagent {software_version()}")


def main() -> None:
    """Entry point of the script `fedagent`."""
    run_program(app)


if __name__ == "__main__":
    main()
