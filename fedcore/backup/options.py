"""How people give what seals and opens backups on a command line: the same words for fedctl and fedserver."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedcore.backup.keys import KeySource, Recipient

RecipientOption = Annotated[
    str,
    typer.Option("--recipient", help="Who can open it, as 'fedctl backup key' prints it; else a passphrase."),
]
PassphraseOption = Annotated[
    Path | None,
    typer.Option("--passphrase-file", help="File with the passphrase, mode 0600; else it is asked for."),
]
KeyOption = Annotated[
    Path | None, typer.Option("--key", help="Key file of 'fedctl backup key', if it was made for one.")
]


def recipient_given(recipient: str, passphrase_file: Path | None) -> "Recipient":
    """Whom a backup is for. Asks for a passphrase, twice, if nothing was given. Raises ConfigError."""
    from fedcore.backup.keys import recipient_from_text, recipient_of_passphrase

    if recipient:
        return recipient_from_text(recipient)
    return recipient_of_passphrase(_passphrase(passphrase_file, confirm=True))


def keys_given(passphrase_file: Path | None, key: Path | None) -> "KeySource":
    """What opens a backup. Asks for a passphrase if nothing was given. Raises ConfigError."""
    from fedcore.backup.keys import from_key_file, from_passphrase

    if key is not None:
        return from_key_file(key)
    return from_passphrase(_passphrase(passphrase_file, confirm=False))


def _passphrase(file: Path | None, *, confirm: bool) -> str:
    from fedcore.backup.keys import read_passphrase

    if file is not None:
        return read_passphrase(file)
    return str(typer.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True))
