"""Credential folders: what a program needs to prove who it is and to know the coordinator.

    ca.crt            the federation's root
    tls.crt           the owner's certificate, then the issuing CA's
    tls.key           the private key, mode 0600
    credential.toml   coordinator = "HOST:PORT", name = federation, role, id

They are replaced as a whole, by renaming folders, so a reader never meets a key and a certificate that
differ.
"""

import json
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
    spki,
    verify_chain,
)
from fedcore.plan import Name
from fedcore.private_files import make_folder, sync_folder, write_file


class CredentialFile(ConfigSection):
    """credential.toml."""

    coordinator: str
    name: Name
    role: Literal["site", "operator", "coordinator"]
    # Empty for the coordinator.
    id: Name | Literal[""] = Field("")

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

    Raises ConfigError if files are missing or malformed, IdentityError if they do not belong together, name
    somebody else than credential.toml says, or the certificate is not valid at `now` (unless
    `allow_expired`).
    """
    settings = load_config(folder / "credential.toml", CredentialFile)
    ca_pem, chain_pem, key_pem = (_read(folder / name) for name in ("ca.crt", "tls.crt", "tls.key"))
    root = _only(certificates_from_pem(ca_pem, str(folder / "ca.crt")), folder / "ca.crt")
    chain = certificates_from_pem(chain_pem, str(folder / "tls.crt"))
    key = key_from_pem(key_pem, str(folder / "tls.key"))
    subject = Subject(settings.name, settings.role, settings.id)
    check_issued(chain, root, key, subject, f"credential {folder}")
    if not allow_expired:
        check_validity(
            chain[0].not_valid_before_utc,
            chain[0].not_valid_after_utc,
            now,
            f"credential {folder}",
            role=subject.role,
        )
    return Credential(folder, settings.coordinator, subject, chain[0], ca_pem, chain_pem, key_pem)


def check_issued(
    chain: Sequence[x509.Certificate],
    root: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    subject: Subject,
    who: str,
) -> None:
    """Check that a chain belongs to a key, to an owner and to a root.

    Raises IdentityError that says what differs.
    """
    public_key = chain[0].public_key()
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or spki(public_key) != spki(key.public_key()):
        raise IdentityError(f"{who}: the certificate is not of this private key")
    named = subject_of(chain[0])
    if named != subject:
        raise IdentityError(f"{who}: the certificate names {named.spiffe_id}, expected {subject.spiffe_id}")
    verify_chain(chain, root, who)


def write_credential(
    folder: Path,
    *,
    coordinator: str,
    subject: Subject,
    key: ec.EllipticCurvePrivateKey,
    chain: Sequence[x509.Certificate],
    root: x509.Certificate,
    replace: bool = False,
) -> None:
    """Write a credential folder as a whole: beside its place first, then renamed into it.

    Raises ConflictError if the folder is there and `replace` is not set.
    """
    if folder.exists() and not replace:
        raise ConflictError(f"{folder} is already there", hint="use --force to replace the credential")
    make_folder(folder.parent)
    staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write_file(staged / "tls.key", key_to_pem(key))
        write_file(staged / "tls.crt", certificates_to_pem(chain), mode=0o644)
        write_file(staged / "ca.crt", certificates_to_pem([root]), mode=0o644)
        write_file(staged / "credential.toml", _settings_toml(coordinator, subject).encode(), mode=0o644)
        _swap(staged, folder)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def _swap(staged: Path, folder: Path) -> None:
    if not folder.exists():
        staged.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    folder.rename(old)  # onto an empty folder, which rename replaces
    staged.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _settings_toml(coordinator: str, subject: Subject) -> str:
    values = {"coordinator": coordinator, "name": subject.federation, "role": subject.role, "id": subject.id}
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: can't be read: {error.strerror}",
            hint="a credential folder holds ca.crt, tls.crt, tls.key and credential.toml",
        ) from error


def _only(certificates: list[x509.Certificate], path: Path) -> x509.Certificate:
    if len(certificates) != 1:
        raise IdentityError(f"{path}: holds {len(certificates)} certificates, expected the root only")
    return certificates[0]
