"""The federation's certificate authority on the coordinator's disk: root and issuing CA, and what they sign.

Signing needs the issuing CA only; `root.key` may be kept elsewhere (`fedserver init --offline-ca`, fedserver.offline_ca).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec

from fedcore.errors import ConfigError, ConflictError, IdentityError
from fedcore.identity import Subject, check_validity
from fedcore.pki import (
    LEAF_LIFETIME,
    Signer,
    certificates_from_pem,
    certificates_to_pem,
    fingerprint,
    key_from_pem,
    key_id,
    key_to_pem,
    make_issuing_ca,
    make_leaf,
    make_root,
    spki,
    verify_chain,
)
from fedcore.private_files import check_private, make_folder, write_file

PREVIOUS = "previous"


@dataclass(frozen=True, slots=True)
class Retiring:
    """The root and the issuing CA that a federation moves away from. The root may be the present one."""

    root: x509.Certificate
    issuing: Signer


@dataclass(frozen=True, slots=True)
class Authority:
    """Signs the certificates of one federation. `lifetimes` is how long those of each role live (default: 30 days).

    While the federation moves to a new CA, `previous` is the old one: members trust and are trusted under both; they
    get certificates of the new CA. If it is below another root as well, the coordinator keeps a certificate of the old,
    which every member still knows.
    """

    federation: str
    root: x509.Certificate
    issuing: Signer
    lifetimes: Mapping[str, timedelta] = field(default_factory=dict)
    previous: Retiring | None = None

    @property
    def roots(self) -> list[x509.Certificate]:
        """What members trust: the root, and the old one while there is one."""
        return [self.root] if self.anchor == self.root else [self.root, self.anchor]

    @property
    def roots_pem(self) -> str:
        """`roots` as PEM."""
        return certificates_to_pem(self.roots).decode()

    @property
    def anchor(self) -> x509.Certificate:
        """The root above the coordinator's own certificate: what new members pin."""
        return self.root if self.previous is None else self.previous.root

    @property
    def root_pem(self) -> str:
        """`anchor` as PEM."""
        return certificates_to_pem([self.anchor]).decode()

    @property
    def root_fingerprint(self) -> str:
        """SHA-256 of `anchor` (DER), hex."""
        return fingerprint(self.anchor)

    @property
    def issuer(self) -> str:
        """Key identifier of the CA that signs for members."""
        return key_id(self.issuing.certificate)

    def signer_of(self, role: str) -> Signer:
        """The CA that signs for members of a role."""
        keeps_old = role == "coordinator" and self.previous is not None and self.anchor != self.root
        return self.previous.issuing if keeps_old and self.previous is not None else self.issuing

    @property
    def issuers(self) -> frozenset[str]:
        """Key identifiers of the CAs whose certificates are accepted."""
        return frozenset(key_id(ca) for ca in self._cas())

    def _cas(self) -> list[x509.Certificate]:
        old = [] if self.previous is None else [self.previous.issuing.certificate]
        return [self.issuing.certificate, *old]

    def issuer_of(self, certificate: x509.Certificate) -> str:
        """Key identifier of the trusted CA that signed a certificate; empty if none of them did."""
        for ca in self._cas():
            try:
                certificate.verify_directly_issued_by(ca)
            except (ValueError, TypeError, InvalidSignature):
                continue
            return key_id(ca)
        return ""

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
        signer = self.signer_of(subject.role)
        ca = signer.certificate
        check_validity(ca.not_valid_before_utc, ca.not_valid_after_utc, now, "issuing CA")
        leaf = make_leaf(
            signer,
            key,
            federation=self.federation,
            spiffe_id=subject.spiffe_id,
            hosts=hosts,
            server=subject.role == "coordinator",
            now=now,
            lifetime=self.lifetimes.get(subject.role, LEAF_LIFETIME),
        )
        return [leaf, ca]


def create_authority(
    folder: Path,
    federation: str,
    now: datetime,
    lifetimes: Mapping[str, timedelta] | None = None,
    *,
    root_folder: Path | None = None,
) -> Authority:
    """Make root and issuing CA and write them to `folder`: root.crt, root.key, issuing.crt, issuing.key; the root's key to
    `root_folder` instead if that is given, with root.crt beside it.

    Raises ConflictError if the folder is there: a federation's root is never overwritten.
    """
    if folder.exists():
        raise ConflictError(f"{folder} is already there: a federation's root is never overwritten")
    root = make_root(federation, now)
    issuing = make_issuing_ca(root, federation, now)
    make_folder(folder)
    write_signer(root_folder or folder, "root", root)
    write_certificate(folder / "root.crt", root.certificate)
    write_signer(folder, "issuing", issuing)
    return Authority(federation, root.certificate, issuing, lifetimes or {})


def write_signer(folder: Path, name: str, signer: Signer) -> None:
    """Write NAME.key and NAME.crt to an existing folder."""
    write_file(folder / f"{name}.key", key_to_pem(signer.key))
    write_certificate(folder / f"{name}.crt", signer.certificate)


def write_certificate(path: Path, certificate: x509.Certificate) -> None:
    """Write one certificate; anybody may read it."""
    write_file(path, certificates_to_pem([certificate]), mode=0o644)


def read_signer(folder: Path, name: str) -> Signer:
    """Read NAME.key and NAME.crt, which must belong together.

    Raises ConfigError for missing or malformed files and a key that others may read, IdentityError.
    """
    certificate = read_certificate(folder / f"{name}.crt")
    path = folder / f"{name}.key"
    key = key_from_pem(read(path), str(path))
    check_private(path)
    public_key = certificate.public_key()
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or spki(public_key) != spki(key.public_key()):
        raise IdentityError(f"{folder}: {name}.crt is not of {name}.key")
    return Signer(certificate, key)


def load_authority(
    folder: Path, federation: str, lifetimes: Mapping[str, timedelta] | None = None
) -> Authority:
    """Read root certificate and issuing CA, and check that they belong together.

    Raises ConfigError for missing or malformed files and for keys that others may read, IdentityError for ones that
    do not belong together.
    """
    root, issuing = _load_pair(folder)
    old = folder / PREVIOUS
    previous = Retiring(*_load_pair(old)) if old.is_dir() else None
    return Authority(federation, root, issuing, lifetimes or {}, previous)


def _load_pair(folder: Path) -> tuple[x509.Certificate, Signer]:
    root = read_certificate(folder / "root.crt")
    issuing = read_signer(folder, "issuing")
    if (folder / "root.key").exists():  # it may be kept elsewhere
        check_private(folder / "root.key")
    verify_chain([issuing.certificate], root, str(folder))
    return root, issuing


def read_certificate(path: Path) -> x509.Certificate:
    """Read a file with one certificate. Raises ConfigError, IdentityError."""
    certificates = certificates_from_pem(read(path), str(path))
    if len(certificates) != 1:
        raise IdentityError(f"{path}: holds {len(certificates)} certificates, expected one")
    return certificates[0]


def read(path: Path) -> bytes:
    """The bytes of a file of the CA's. Raises ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: can't be read: {error.strerror}",
            hint="is --home the folder that 'fedserver init' made?",
        ) from error
