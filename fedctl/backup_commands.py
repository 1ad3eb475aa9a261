"""fedctl backup: the coordinator's state as one sealed file; made, listed, checked, and restored on its machine."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcore.backup.options import KeyOption, PassphraseOption, RecipientOption, keys_given, recipient_given
from fedctl.admin import Admin, open_admin
from fedctl.render import Column, Output, OutputOption, note, print_object, print_rows

if TYPE_CHECKING:
    from fedcore.backup.files import Checked
    from fedcore.backup.keys import Recipient
    from fedcore.v1 import backup_pb2

app = typer.Typer(
    no_args_is_help=True,
    help="Backups of the coordinator: one encrypted file. Making one takes the role owner.",
)

COLUMNS = [
    Column("FILE", "file"), Column("FEDERATION", "federation"), Column("TERM", "term", True),
    Column("MADE", "created_at"), Column("BYTES", "bytes", True), Column("OPENS WITH", "opens_with"),
    Column("BACKUP", "id"), Column("PROBLEM", "problem"),
]  # fmt: skip

FileArgument = Annotated[Path, typer.Argument(help="A backup.", exists=True, dir_okay=False)]


@app.command("key")
def make_key(
    out: Annotated[Path, typer.Option(help="The file for the private key; it must not be there.")],
) -> None:
    """Make a key pair for backups. Only the holder of the file can open them; print what `create --recipient` takes."""
    from fedcore.backup.keys import make_key_file

    print(make_key_file(out))
    note(
        f"{out} opens the backups that are made for it. Keep it away from the coordinator, and not only once."
    )


@app.command("create")
def create(
    ctx: typer.Context,
    out: Annotated[
        Path | None,
        typer.Option(help="The file; FEDERATION-TIME.fedbackup here if not given. Never overwritten."),
    ] = None,
    recipient: RecipientOption = "",
    passphrase_file: PassphraseOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Back up the running coordinator: its database, keys, configuration and the artifacts that runs need, as of one
    moment. It is encrypted before it leaves the coordinator.
    """
    from fedcore.backup.files import write_backup
    from fedcore.errors import TruncatedStreamError

    whom = recipient_given(recipient, passphrase_file)
    with open_admin(ctx) as admin:
        taking = _Taking(admin, whom)
        written = write_backup(out or _default_name(ctx), taking.pieces())
    summary = taking.summary
    if summary is None or (summary.sha256, summary.file_bytes) != (written.sha256, written.size):
        written.path.unlink()
        raise TruncatedStreamError(f"{admin.who}: the backup did not arrive whole", hint="make it again")
    document = {
        "file": str(written.path), "id": summary.id, "created_at": summary.created_at, "term": summary.term,
        "bytes": written.size, "sha256": written.sha256, "artifacts": summary.artifacts,
        "absent": list(summary.absent),
    }  # fmt: skip
    print_object(output, document, list(document.items()))
    if summary.absent:
        note(f"{len(summary.absent)} artifacts that runs name are missing or damaged at the coordinator")


@app.command("list")
def list_files(
    folder: Annotated[Path, typer.Argument(help="A folder with backups.", file_okay=False)] = Path(),
    output: OutputOption = Output.TABLE,
) -> None:
    """List the backups in a folder, the oldest first, by what they say of themselves; `verify` proves it."""
    from fedcore.backup.files import SUFFIX

    rows = [_row(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    rows.sort(key=lambda row: str(row["created_at"]))
    print_rows(output, "backups", rows, COLUMNS, empty=f"no *{SUFFIX} in {folder}")


@app.command("verify")
def verify(
    file: FileArgument,
    passphrase_file: PassphraseOption = None,
    key: KeyOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Check a backup completely, without a coordinator: every byte, the database, the certificates."""
    from fedcore.backup.files import check_backup

    checked = check_backup(file, keys_given(passphrase_file, key))
    document = _document(file, checked)
    print_object(output, document, [(name.replace("_", " "), value) for name, value in document.items()])


@app.command("restore")
def restore(
    file: FileArgument,
    home: Annotated[Path, typer.Option("--home", help="The new coordinator's folder, on this machine.")],
    passphrase_file: PassphraseOption = None,
    key: KeyOption = None,
    revoked: Annotated[
        str,
        typer.Option("--revoked", help="What was revoked since the backup: SERIAL, site/ID, operator/ID."),
    ] = "",
    no_revocations_since: Annotated[
        bool, typer.Option("--no-revocations-since", help="Nothing was revoked since the backup.")
    ] = False,
    term: Annotated[int, typer.Option(help="The least number of the new term.", min=0)] = 0,
) -> None:
    """Make a coordinator's home from a backup: runs `fedserver restore` here, on what will be its machine."""
    words = ["--home", str(home), "--from", str(file), "--term", str(term)]
    for option, value in (("--passphrase-file", passphrase_file), ("--key", key), ("--revoked", revoked)):
        if value:
            words += [option, str(value)]
    if no_revocations_since:
        words.append("--no-revocations-since")
    done = subprocess.run([sys.executable, "-m", "fedserver.cli", "restore", *words], check=False)
    raise typer.Exit(done.returncode)


class _Taking:
    """A backup on its way; `summary` is what the coordinator said of it at the end."""

    def __init__(self, admin: Admin, recipient: "Recipient") -> None:
        self._admin = admin
        self._recipient = recipient
        self.summary: backup_pb2.BackupSummary | None = None

    def pieces(self) -> Iterator[bytes]:
        """The file, piece by piece."""
        from fedcore.v1 import backup_pb2

        request = backup_pb2.CreateBackupRequest(recipient=self._recipient.public)
        if (terms := self._recipient.scrypt) is not None:
            salt = bytes.fromhex(terms.salt)
            request.scrypt.CopyFrom(backup_pb2.ScryptParameters(salt=salt, n=terms.n, r=terms.r, p=terms.p))
        for part in self._admin.stream(lambda _: self._admin.backup.CreateBackup, request):
            if part.WhichOneof("part") == "summary":
                self.summary = part.summary
            else:
                yield part.data


def _default_name(ctx: typer.Context) -> Path:
    from datetime import UTC, datetime

    from fedcore.backup.files import SUFFIX
    from fedctl.contexts import load_contexts

    name = ctx.obj.context or load_contexts(ctx.obj.config_dir).current
    return Path(f"{name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}{SUFFIX}")


def _row(path: Path) -> dict[str, Any]:
    from fedcore.backup.envelope import read_header
    from fedcore.errors import FedimpresError

    row: dict[str, Any] = {"file": str(path), "bytes": os.stat(path).st_size, "problem": ""}
    try:
        header = read_header(path)
    except FedimpresError as error:
        return {**row, "federation": "", "term": None, "created_at": "", "opens_with": "", "id": "",
                "problem": error.message}  # fmt: skip
    return {
        **row, "federation": header.federation, "term": header.term, "created_at": header.created_at,
        "opens_with": "passphrase" if header.scrypt else "key file", "id": header.id,
    }  # fmt: skip


def _document(file: Path, checked: "Checked") -> dict[str, Any]:
    header, manifest = checked.header, checked.manifest
    return {
        "file": str(file), "ok": True, "id": header.id, "federation": header.federation, "term": header.term,
        "created_at": header.created_at, "software_version": header.software_version,
        "schema_version": header.schema_version, "members": len(manifest.members), "bytes": checked.total_bytes,
        "artifacts": manifest.artifacts, "absent": list(manifest.absent),
    }  # fmt: skip
