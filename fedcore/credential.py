"""Credential folders: what a program needs to prove who it is and to know the coordinator.

    ca.crt            the federation's root; two while the federation moves to a new one
    tls.crt           the owner's certificate, then the issuing CA's
    tls.key           the private key, mode 0600
    credential.toml   coordinator = "HOST:PORT", name = federation, role, id, enroll_port (a site's)

They are replaced as a whole, by exchanging folders in one step, and read from one folder, so neither a reader nor a
crash ever meets a key and a certificate that differ.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field, field_validator

from fedcore.config import ConfigSection, load_config
from fedcore.errors import ConfigError, ConflictError, IdentityError
from fedcore.identity import Subject, check_validity, subject_of
from fedcore.pki import (
    certificates_from_pem,
    certificates_to_pem,
    key_from_pem,
    key_to_pem,
    root_of,
    spki,
    verify_chain,
)
from fedcore.plan import Name
from fedcore.private_files import check_private, exchange, sync_folder, write_file

_READ_ATTEMPTS = 5


class CredentialFile(ConfigSection):
    """credential.toml."""

    coordinator: str
    name: Name
    role: Literal["site", "operator", "coordinator"]
    # Empty for the coordinator.
    id: Name | Literal[""] = Field("")
    # Where a site renews once its certificate has ended; unknown to credentials of earlier versions.
    enroll_port: int | None = Field(None, ge=1, le=65535)

    @field_validator("coordinator")
    @classmethod
    def _is_address(cls, value: str) -> str:
        try:
            split_address(value)
        except ConfigError as error:
            raise ValueError(error.message) from error
        return value


@dataclass(frozen=True, slots=True)
class Credential:
    """A credential folder that was found consistent: the key fits the certificate, the chain ends at the
    root.
    """

    folder: Path
    coordinator: str
    subject: Subject
    certificate: x509.Certificate
    ca_pem: bytes = field(repr=False)
    chain_pem: bytes = field(repr=False)
    key_pem: bytes = field(repr=False)
    enroll_port: int | None = None

    @property
    def federation(self) -> str:
        """Name of the federation."""
        return self.subject.federation


def split_address(text: str) -> tuple[str, int]:
    """HOST:PORT or [IPv6]:PORT to host and port. Raises ConfigError."""
    host, separator, port = text.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    bad_host = not bare or "/" in bare or any(c.isspace() for c in bare) or (":" in bare and not bracketed)
    if not separator or bad_host or not (port.isascii() and port.isdigit()) or not 1 <= int(port) <= 65535:
        raise ConfigError(
            f"{text!r:.120} is not an address: expected HOST:PORT", hint="for example fed.example.org:8443"
        )
    return bare, int(port)


def join_address(host: str, port: int) -> str:
    """Host and port to HOST:PORT; IPv6 addresses get brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def load_credential(folder: Path, now: datetime, *, allow_expired: bool = False) -> Credential:
    """Read and check a credential folder.

    Raises ConfigError if files are missing or malformed, or the key may be read by others; IdentityError if they do not
    belong together, name somebody else than credential.toml says, or the certificate is not valid at `now` (unless
    `allow_expired`).
    """
    settings, ca_pem, chain_pem, key_pem = _read_whole(folder)
    roots = certificates_from_pem(ca_pem, str(folder / "ca.crt"))
    chain = certificates_from_pem(chain_pem, str(folder / "tls.crt"))
    key = key_from_pem(key_pem, str(folder / "tls.key"))
    subject = Subject(settings.name, settings.role, settings.id)
    check_issued(chain, roots, key, subject, f"credential {folder}")
    if not allow_expired:
        check_validity(
            chain[0].not_valid_before_utc,
            chain[0].not_valid_after_utc,
            now,
            f"credential {folder}",
            role=subject.role,
        )
    return Credential(
        folder, settings.coordinator, subject, chain[0], ca_pem, chain_pem, key_pem, settings.enroll_port
    )


def check_issued(
    chain: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    key: ec.EllipticCurvePrivateKey,
    subject: Subject,
    who: str,
) -> None:
    """Check that a chain belongs to a key, to an owner and to one of the roots.

    Raises IdentityError that says what differs.
    """
    public_key = chain[0].public_key()
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or spki(public_key) != spki(key.public_key()):
        raise IdentityError(f"{who}: the certificate is not of this private key")
    named = subject_of(chain[0])
    if named != subject:
        raise IdentityError(f"{who}: the certificate names {named.spiffe_id}, expected {subject.spiffe_id}")
    verify_chain(chain, root_of(chain, roots), who)


def write_credential(
    folder: Path,
    *,
    coordinator: str,
    subject: Subject,
    key: ec.EllipticCurvePrivateKey,
    chain: Sequence[x509.Certificate],
    roots: Sequence[x509.Certificate],
    enroll_port: int | None = None,
    replace: bool = False,
) -> None:
    """Write a credential folder as a whole: beside its place first, then renamed into it.

    Raises ConflictError if the folder is there and `replace` is not set.
    """
    if folder.exists() and not replace:
        raise ConflictError(f"{folder} is already there", hint="use --force to replace the credential")
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # one that is there keeps its mode
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write_file(staged / "tls.key", key_to_pem(key))
        write_file(staged / "tls.crt", certificates_to_pem(chain), mode=0o644)
        write_file(staged / "ca.crt", certificates_to_pem(roots), mode=0o644)
        settings = _settings_toml(coordinator, subject, enroll_port)
        write_file(staged / "credential.toml", settings.encode(), mode=0o644)
        _swap(staged, folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def accept_renewal(
    old: Credential,
    key: ec.EllipticCurvePrivateKey,
    chain_pem: str,
    ca_pem: str,
    now: datetime,
    *,
    enroll_port: int | None = None,
) -> None:
    """Replace the credential folder of `old` by the coordinator's answer to a request for `key`, once it is found to
    be what was asked for. `ca_pem` holds the roots to trust from now on.

    Raises IdentityError if it is not the same owner's, not of this key, not below these roots or not valid at `now`;
    the folder is then as it was.
    """
    who = f"renewed certificate of {old.subject.spiffe_id}"
    chain = certificates_from_pem(chain_pem.encode(), who)
    roots = certificates_from_pem(ca_pem.encode(), f"roots sent with the {who}")
    check_issued(chain, roots, key, old.subject, who)
    check_validity(chain[0].not_valid_before_utc, chain[0].not_valid_after_utc, now, who)
    write_credential(
        old.folder,
        coordinator=old.coordinator,
        subject=old.subject,
        key=key,
        chain=chain,
        roots=roots,
        enroll_port=enroll_port or old.enroll_port,
        replace=True,
    )


def _swap(staged: Path, folder: Path) -> None:
    if not folder.exists():
        staged.rename(folder)
        return
    try:
        exchange(staged, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            raise
        # A file system without it (NFS). A crash between the two renames leaves the old one under a name that
        # readers look for.
        old = _set_aside(folder)
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        staged.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        return
    sync_folder(folder.parent)
    shutil.rmtree(staged, ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _settings_toml(coordinator: str, subject: Subject, enroll_port: int | None) -> str:
    values: dict[str, str | int] = {
        "coordinator": coordinator, "name": subject.federation, "role": subject.role, "id": subject.id,
    }  # fmt: skip
    if enroll_port is not None:
        values["enroll_port"] = enroll_port
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def _read_whole(folder: Path) -> tuple[CredentialFile, bytes, bytes, bytes]:
    """The four files of one folder; read again if another took its place meanwhile."""
    for _ in range(_READ_ATTEMPTS):
        if not folder.exists() and _set_aside(folder).is_dir():
            _set_aside(folder).rename(folder)  # a crash in `_swap` left it
        before = _inode(folder)
        try:
            settings = load_config(folder / "credential.toml", CredentialFile)
            ca_pem, chain_pem, key_pem = (_read(folder / name) for name in ("ca.crt", "tls.crt", "tls.key"))
            check_private(folder / "tls.key")
        except ConfigError:
            if _inode(folder) == before:
                raise
            continue
        if _inode(folder) == before:
            return settings, ca_pem, chain_pem, key_pem
    raise ConfigError(f"{folder}: was replaced {_READ_ATTEMPTS} times while it was read")


def _inode(folder: Path) -> int:
    try:
        return os.stat(folder).st_ino
    except OSError:
        return 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: can't be read: {error.strerror}",
            hint="a credential folder holds ca.crt, tls.crt, tls.key and credential.toml",
        ) from error
