"""`fedagent`: enrol a site and serve. What the site's own people do with it is in site_commands."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedagent.audit_commands import audit_app
from fedagent.impression_commands import impressions_app
from fedagent.site_commands import HomeOption, add_to
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


@app.command("enroll")
def enroll_command(
    home: HomeOption,
    coordinator: Annotated[str, typer.Option(help="HOST:PORT of the coordinator.")],
    token: Annotated[
        str, typer.Option(help="The enrolment token; '-' reads it from stdin.", envvar="FEDAGENT_TOKEN")
    ],
    ca_fingerprint: Annotated[str, typer.Option(help="SHA-256 of the federation's root certificate.")],
    proxy: Annotated[str | None, typer.Option(help="HTTP CONNECT proxy, http://HOST:PORT.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the credential of an enrolled home.")
    ] = False,
) -> None:
    """Exchange a single-use token for this site's certificate. The private key never leaves it."""
    from fedagent.enroll import enroll

    enrolled = enroll(
        home,
        coordinator=coordinator,
        token=sys.stdin.read() if token == "-" else token,  # noqa: S105 - a file name's dash
        ca_fingerprint=ca_fingerprint,
        proxy=proxy,
        force=force,
    )
    typer.echo(
        f"Site {enrolled.site} belongs to federation {enrolled.federation} (certificate until "
        f"{enrolled.not_after:%Y-%m-%d}).\nNext: say in {home / 'agent.toml'} where the images lie, then "
        f"fedagent serve --home {home}"
    )


@app.command()
def serve(
    home: HomeOption,
    data: Annotated[Path | None, typer.Option(help="The site's images; overrides agent.toml.")] = None,
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
