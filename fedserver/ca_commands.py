"""`fedserver ca`: an issuing CA signed by files, with a root that is kept offline."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

ca_app = typer.Typer(
    no_args_is_help=True,
    help="A new issuing CA from a root that is kept offline: request here, sign there, install here.",
)

HomeOption = Annotated[Path, typer.Option("--home", help="The coordinator's folder.", file_okay=False)]
RootOption = Annotated[
    Path, typer.Option("--root", help="Folder with root.crt and root.key.", file_okay=False)
]
OutOption = Annotated[Path, typer.Option("--out", help="File to write; it holds no secret.", dir_okay=False)]


@ca_app.command("request")
def request(home: HomeOption, out: OutOption) -> None:
    """On the coordinator: make a key for a new issuing CA, and write a request for it to a file."""
    from fedserver.offline_ca import request_ca

    fingerprint = request_ca(home, out)
    typer.echo(
        f"Request in {out}; key fingerprint {fingerprint}\nNext, where the root's key is: fedserver ca sign --root DIR "
        f"--request {out.name} --fingerprint {fingerprint} --out issuing.pem"
    )


@ca_app.command("sign")
def sign(
    root: RootOption,
    request: Annotated[Path, typer.Option("--request", help="What `ca request` wrote.", dir_okay=False)],
    out: OutOption,
    fingerprint: Annotated[
        str,
        typer.Option("--fingerprint", help="The key's, as `ca request` printed it; refused if it differs."),
    ] = "",
    days: Annotated[int, typer.Option("--days", help="How long it lives.", min=1, max=3652)] = 365,
) -> None:
    """Where the root's key is (no coordinator needed): sign a request."""
    from fedserver.offline_ca import sign_ca

    signed = sign_ca(
        root, request, out, datetime.now(UTC), expected=fingerprint, lifetime=timedelta(days=days)
    )
    typer.echo(
        f"Issuing CA in {out}, until {signed.not_after:%Y-%m-%d}; key fingerprint {signed.key_fingerprint}, root "
        f"{signed.root_fingerprint}\nNext, on the coordinator: fedserver ca install --home HOME --certificate {out.name}"
    )


@ca_app.command("install")
def install(
    home: HomeOption,
    certificate: Annotated[Path, typer.Option("--certificate", help="What `ca sign` wrote.", dir_okay=False)],
    new_root: Annotated[
        str, typer.Option("--new-root", help="Fingerprint of a root that takes the place of the present one.")
    ] = "",
) -> None:
    """On the coordinator, also while it serves: sign with the new issuing CA, and go on trusting the old one."""
    from fedserver.offline_ca import install_ca

    installed = install_ca(home, certificate, datetime.now(UTC), new_root=new_root)
    typer.echo(
        f"The new issuing CA signs from now on, until {installed.not_after:%Y-%m-%d}; a coordinator that serves takes it "
        "over within seconds.\nNext: agents renew by themselves, each operator by 'fedctl cert renew'; then "
        "'fedctl cert ca rotate --finish' drops the old one"
    )


@ca_app.command("root")
def root_command(
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder for root.crt and root.key; absent or empty.", file_okay=False),
    ],
    name: Annotated[str, typer.Option("--name", help="The federation's name.")],
) -> None:
    """On the offline machine: make another root, to replace the federation's present one by."""
    from fedserver.offline_ca import make_offline_root

    fingerprint = make_offline_root(out, name, datetime.now(UTC))
    typer.echo(
        f"Root in {out}; CA fingerprint {fingerprint}\nNext: request, sign with --root {out}, then on the coordinator: "
        f"fedserver ca install --new-root {fingerprint}"
    )
