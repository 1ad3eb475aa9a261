"""The federation's certificate authority on the coordinator's disk: root and issuing CA, and what they sign.

Signing needs the issuing CA only; `root.key` may be kept elsewhere once the home is initialised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedcore.errors import ConfigError, ConflictError, IdentityError
from fedcore.identity import Subject, check_validity
from fedcore.pki import (
    Signer,
    certificates_from_pem,
    certificates_to_pem,
    fingerprint,
    key_from_pem,
    key_to_pem,
    make_issuing_ca,
    make_leaf,
    make_root,
    spki,
    verify_chain,
)
from fedcore.private_files import make_folder, write_file


@dataclass(frozen=True, slots=True)
class Authority:
    """Signs the certificates of one federation."""

    federation: str
    root: x509.Certificate
    issuing: Signer

    @property
    def root_pem(self) -> str:
        """The root certificate: what members trust."""
        return certificates_to_pem([self.root]).decode()

    @property
    def root_fingerprint(self) -> str:
        """SHA-256 of the root (DER), hex: what sites pin."""
        return fingerprint(self.root)

    def issue(
        self,
        subject: Subject,
        key: ec.EllipticCurvePublicKey,
        now: datetime,
        *,
        hosts: Sequence[str] = (),
    ) -> list[x509.Certificate]:
        """A certificate for `subject`, followed by the issuing CA's.

        Only the coordinator's certificate is for servers, and only it names hosts. Raises IdentityError if
        the issuing CA has ended or the subject is of another federation.
        """
        if subject.federation != self.federation:
            raise IdentityError(f"asked to certify {subject.spiffe_id}, but this is {self.federation!r}")
        ca = self.issuing.certificate
        check_validity(ca.not_valid_before_utc, ca.not_valid_after_utc, now, "issuing CA")
        leaf = make_leaf(
            self.issuing,
            key,
            federation=self.federation,
            spiffe_id=subject.spiffe_id,
            hosts=hosts,
            server=subject.role == "coordinator",
            now=now,
        )
        return [leaf, ca]


def create_authority(folder: Path, federation: str, now: datetime) -> Authority:
    """Make root and issuing CA and write them to `folder`: root.crt, root.key, issuing.crt, issuing.key.

    Raises ConflictError if the folder is there: a federation's root is never overwritten.
    """
    if folder.exists():
        raise ConflictError(f"{folder} is already there: a federation's root is never overwritten")
    root = make_root(federation, now)
    issuing = make_issuing_ca(root, federation, now)
    make_folder(folder)
    for name, signer in (("root", root), ("issuing", issuing)):
        write_file(folder / f"{name}.key", key_to_pem(signer.key))
        write_file(folder / f"{name}.crt", certificates_to_pem([signer.certificate]), mode=0o644)
    return Authority(federation, root.certificate, issuing)


def load_authority(folder: Path, federation: str) -> Authority:
    """Read root certificate and issuing CA, and check that they belong together.

    Raises ConfigError for missing or malformed files, IdentityError for ones that do not belong together.
    """
    root = _one(folder / "root.crt")
    certificate = _one(folder / "issuing.crt")
    key = key_from_pem(_read(folder / "issuing.key"), str(folder / "issuing.key"))
    public_key = certificate.public_key()
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or spki(public_key) != spki(key.public_key()):
        raise IdentityError(f"{folder}: issuing.crt is not of issuing.key")
    verify_chain([certificate], root, str(folder))
    return Authority(federation, root, Signer(certificate, key))


def _one(path: Path) -> x509.Certificate:
    certificates = certificates_from_pem(_read(path), str(path))
    if len(certificates) != 1:
        raise IdentityError(f"{path}: holds {len(certificates)} certificates, expected one")
    return certificates[0]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: can't be read: {error.strerror}",
            hint="is --home the folder that 'fedserver init' made?",
        ) from error
