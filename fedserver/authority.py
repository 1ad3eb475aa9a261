"""The federation's certificate authority on the coordinator's disk: root and issuing CA, and what they sign.

Signing needs the issuing CA only; `root.key` may be kept elsewhere once the home is initialised.
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
    """The root and the issuing CA that a federation moves away from."""

    root: x509.Certificate
    issuing: Signer


@dataclass(frozen=True, slots=True)
class Authority:
    """Signs the certificates of one federation. `lifetimes` is how long those of each role live (default: 30 days).

    While the federation moves to a new CA, `previous` is the old one: members trust and are trusted under both; they
    get certificates of the new CA, and the coordinator keeps one of the old, which every member still knows.
    """

    federation: str
    root: x509.Certificate
    issuing: Signer
    lifetimes: Mapping[str, timedelta] = field(default_factory=dict)
    previous: Retiring | None = None

    @property
    def roots(self) -> list[x509.Certificate]:
        """What members trust: the root, and the old one while there is one."""
        return [self.root] if self.previous is None else [self.root, self.previous.root]

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
        server = subject.role == "coordinator"
        signer = self.previous.issuing if server and self.previous is not None else self.issuing
        ca = signer.certificate
        check_validity(ca.not_valid_before_utc, ca.not_valid_after_utc, now, "issuing CA")
        leaf = make_leaf(
            signer,
            key,
            federation=self.federation,
            spiffe_id=subject.spiffe_id,
            hosts=hosts,
            server=server,
            now=now,
            lifetime=self.lifetimes.get(subject.role, LEAF_LIFETIME),
        )
        return [leaf, ca]


def create_authority(
    folder: Path, federation: str, now: datetime, lifetimes: Mapping[str, timedelta] | None = None
) -> Authority:
    """Make root and issuing CA and write them to `folder`: root.crt, root.key, issuing.crt, issuing.key.

    Raises ConflictError if the folder is there: a federation's root is never overwritten.
    """
    if folder.exists():
        raise ConflictError(f"{folder} is already there: a federation's root is never overwritten")
    root = make_root(federation, now)
    issuing = make_issuing_ca(root, federation, now)
    make_folder(folder)
    write_signers(folder, root, issuing)
    return Authority(federation, root.certificate, issuing, lifetimes or {})


def write_signers(folder: Path, root: Signer, issuing: Signer) -> None:
    """Write root.crt, root.key, issuing.crt and issuing.key to an existing folder."""
    for name, signer in (("root", root), ("issuing", issuing)):
        write_file(folder / f"{name}.key", key_to_pem(signer.key))
        write_file(folder / f"{name}.crt", certificates_to_pem([signer.certificate]), mode=0o644)


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
    root = _one(folder / "root.crt")
    certificate = _one(folder / "issuing.crt")
    key = key_from_pem(_read(folder / "issuing.key"), str(folder / "issuing.key"))
    for private in (folder / "issuing.key", folder / "root.key"):
        if private.exists():  # root.key may be kept elsewhere
            check_private(private)
    public_key = certificate.public_key()
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or spki(public_key) != spki(key.public_key()):
        raise IdentityError(f"{folder}: issuing.crt is not of issuing.key")
    verify_chain([certificate], root, str(folder))
    return root, Signer(certificate, key)


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
