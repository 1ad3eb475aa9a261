"""fedserver's commands for the coordinator's machine: back up, restore, release, migrate."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcore.backup.options import KeyOption, PassphraseOption, RecipientOption, keys_given, recipient_given

if TYPE_CHECKING:
    from fedserver.restore import Released, Revoked

HomeOption = Annotated[Path, typer.Option("--home", help="The coordinator's folder.", file_okay=False)]
RevokedOption = Annotated[
    str,
    typer.Option(
        "--revoked",
        help="What was revoked since the backup: SERIAL, site/ID, operator/ID; several with commas.",
    ),
]
NothingRevokedOption = Annotated[
    bool, typer.Option("--no-revocations-since", help="Nothing was revoked since the backup.")
]

backup_app = typer.Typer(no_args_is_help=True, help="Backups of a coordinator that does not run.")


@backup_app.command("create")
def backup_create(
    home: HomeOption,
    out: Annotated[Path, typer.Option(help="The file to write; it must not be there.")],
    recipient: RecipientOption = "",
    passphrase_file: PassphraseOption = None,
) -> None:
    """Back up a home whose coordinator is stopped. Beside a running one: fedctl backup create."""
    from fedserver.backup import back_up_home

    taken, written = back_up_home(home, out, recipient_given(recipient, passphrase_file), datetime.now(UTC))
    typer.echo(
        f"Backup {taken.id} in {out}: {written.size} bytes, {taken.artifacts} artifacts, SHA-256 {written.sha256}."
    )
    if taken.absent:
        typer.echo(f"Not in it, missing or damaged here: {', '.join(taken.absent)}", err=True)


def restore_command(
    home: HomeOption,
    backup: Annotated[Path, typer.Option("--from", help="The backup.", exists=True, dir_okay=False)],
    passphrase_file: PassphraseOption = None,
    key: KeyOption = None,
    revoked: RevokedOption = "",
    no_revocations_since: NothingRevokedOption = False,
    term: Annotated[int, typer.Option(help="The least number of the new term.", min=0)] = 0,
) -> None:
    """Make a coordinator's home from a backup. It begins a new term, which agents follow, and serves nobody until it
    knows what was revoked since the backup: by --revoked, --no-revocations-since, or later by `release`.
    """
    from fedserver.restore import release_home, restore

    if revoked or no_revocations_since:
        given = _revoked(revoked, no_revocations_since)  # refused before anything is made
    now = datetime.now(UTC)
    done = restore(home, backup, keys_given(passphrase_file, key), now, at_least=term)
    typer.echo(
        f"Coordinator of federation {done.header.federation} in {home}, from backup {done.header.id} of "
        f"{done.header.created_at}.\n{done.before} is over; this one is of {done.term}. "
        f"{done.artifacts} artifacts, {done.voided_tokens} open tokens void."
    )
    if done.absent:
        typer.echo(f"Not in the backup, gone when it was made: {', '.join(done.absent)}", err=True)
    if revoked or no_revocations_since:
        _say(release_home(home, given, now), home)
    else:
        typer.echo(
            f"It serves nobody yet. Next: fedserver release --home {home} --revoked SERIAL,... or --no-revocations-since"
        )


def release_command(
    home: HomeOption, revoked: RevokedOption = "", no_revocations_since: NothingRevokedOption = False
) -> None:
    """Let a restored coordinator serve, after it was told what was revoked since the backup. It may run already."""
    from fedserver.restore import release_home

    _say(release_home(home, _revoked(revoked, no_revocations_since), datetime.now(UTC)), home)


def migrate_command(
    home: HomeOption,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Try it on a copy; change nothing.")] = False,
) -> None:
    """Bring the database to this version; `serve` does it too. It is tried on a copy first, and a copy is kept."""
    from fedcore.home_lock import HomeLock
    from fedcore.migration import migrate_file
    from fedserver.checks import load_home
    from fedserver.config import ServerHome
    from fedserver.journal import Journal
    from fedserver.schema import MIGRATIONS

    load_home(home)
    places = ServerHome(home)
    with HomeLock(places.lock):
        # That the journal replays shows that this version understands what is stored.
        check = lambda database: Journal(database).replay()  # noqa: E731
        typer.echo(migrate_file(places.database, MIGRATIONS, dry_run=dry_run, check=check))


def add_to(app: typer.Typer) -> None:
    """Add these commands to the program's."""
    app.add_typer(backup_app, name="backup")
    app.command("restore")(restore_command)
    app.command("release")(release_command)
    app.command("migrate")(migrate_command)


def _revoked(names: str, nothing: bool) -> "Revoked":
    from fedcore.errors import ConfigError
    from fedserver.restore import Revoked

    given = tuple(name.strip() for name in names.split(",") if name.strip())
    if bool(given) == nothing:
        raise ConfigError(
            "give either --revoked SERIAL,... or --no-revocations-since",
            hint="ask who revokes, or look into an exported audit log: certificate.revoke since the backup",
        )
    return Revoked(given)


def _say(released: "Released", home: Path) -> None:
    if released.ended:
        typer.echo(f"Revoked: {', '.join(released.ended)}")
    if released.unknown:
        typer.echo(f"Not in the registry, so refused in any case: {', '.join(released.unknown)}")
    typer.echo(f"The coordinator may serve: fedserver serve --home {home}")
