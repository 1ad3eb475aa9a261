"""A root that is kept offline: what passes between it and the coordinator are files that hold no secret.

request   on the coordinator: a key for a new issuing CA stays in HOME/ca-request/; its request goes to a file
sign      where the root's key is: the request's key becomes an issuing CA; certificate and root go to a file
install   on the coordinator, also while it serves: that CA signs from now on, the old one is trusted until
          `fedctl cert ca rotate --finish`
root      where the root's key is: another root, to replace the present one by
"""

import hmac
import os
import pwd
import shutil
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedcore.audit import Fact
from fedcore.audit_store import AuditLog
from fedcore.database import open_database
from fedcore.errors import ConfigError, ConflictError, FingerprintError, IdentityError
from fedcore.identity import check_validity, is_name
from fedcore.pki import (
    ISSUING_LIFETIME,
    Signer,
    certificates_from_pem,
    certificates_to_pem,
    fingerprint,
    issuing_ca_name,
    key_fingerprint,
    key_from_pem,
    key_id,
    key_to_pem,
    make_request,
    make_root,
    new_key,
    normalise_fingerprint,
    public_key_of_request,
    sign_issuing_ca,
    spki,
    verify_chain,
)
from fedcore.private_files import check_private, make_folder, write_file
from fedserver.authority import read, read_certificate, read_signer, write_signer
from fedserver.checks import load_home
from fedserver.config import ServerConfig, ServerHome
from fedserver.rotation import AuthorityKeeper
from fedserver.schema import MIGRATIONS


@dataclass(frozen=True, slots=True)
class SignedCa:
    """An issuing CA: when it ends, the fingerprint (SHA-256, hex) of its key, and that of the root it is below."""

    not_after: datetime
    key_fingerprint: str
    root_fingerprint: str


def make_offline_root(folder: Path, federation: str, now: datetime) -> str:
    """Write root.crt and root.key to `folder`, which must be absent or empty; gives the root's fingerprint.

    Raises ConfigError for a name that is not allowed, ConflictError if something is there.
    """
    if not is_name(federation):
        raise ConfigError(f"{federation!r:.80} is not a federation's name")
    prepare_root_folder(folder)
    root = make_root(federation, now)
    write_signer(folder, "root", root)
    return fingerprint(root.certificate)


def prepare_root_folder(folder: Path) -> None:
    """Make the folder that a root's key goes to, unless an empty one is there. Raises ConflictError, ConfigError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"{folder}: can't be used for the root's key: {error}") from error
    if used:
        raise ConflictError(
            f"{folder} is not empty; nothing was changed",
            hint="a root is never overwritten: name another folder",
        )


def request_ca(home: Path, out: Path) -> str:
    """Write a request for a new issuing CA to `out`; gives its key's fingerprint. The key stays in the home; one that is
    waiting for its certificate is used again.

    Raises ConfigError for a home that is none, or another user's.
    """
    config, places = _load_own_home(home), ServerHome(home)
    key_path = places.ca_request / "issuing.key"
    present = spki(read_signer(places.pki, "issuing").key.public_key())
    key = _pending_key(key_path) if key_path.exists() else None
    if key is None or spki(key.public_key()) == present:  # the present one's: an install was cut short
        key = new_key()
        make_folder(places.ca_request)
        write_file(key_path, key_to_pem(key))
    _write_out(out, make_request(key, issuing_ca_name(config.name)))
    return key_fingerprint(key.public_key())


def sign_ca(
    root_folder: Path,
    request: Path,
    out: Path,
    now: datetime,
    *,
    expected: str = "",
    lifetime: timedelta = ISSUING_LIFETIME,
) -> SignedCa:
    """Sign a request with the root in `root_folder` (root.crt, root.key); the issuing CA's certificate and the root go to
    `out`. `expected` is the request's key fingerprint as the coordinator showed it, compared if it is given.

    Raises ConfigError, IdentityError for files that are not what they should be, FingerprintError if another key asks,
    ConflictError for a request of another federation.
    """
    root = read_signer(root_folder, "root")
    federation = _organisation(root.certificate)
    pem = read(request).decode("ascii", "replace")
    key = public_key_of_request(pem)
    name = x509.load_pem_x509_csr(pem.encode()).subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if [one.value for one in name] != [issuing_ca_name(federation)]:
        raise ConflictError(
            f"{request} asks for {', '.join(str(one.value) for one in name)!r:.100}, but the root in {root_folder} is "
            f"of federation {federation}"
        )
    got = key_fingerprint(key)
    if expected and not hmac.compare_digest(normalise_fingerprint(expected), got):
        raise FingerprintError(
            f"{request} is of the key {got}, expected {expected:.100}; nothing was signed",
            hint="compare with what 'fedserver ca request' printed on the coordinator",
        )
    check_validity(root.certificate.not_valid_before_utc, root.certificate.not_valid_after_utc, now, "root")
    certificate = sign_issuing_ca(root, key, federation, now, lifetime)
    _write_out(out, certificates_to_pem([certificate, root.certificate]))
    return SignedCa(certificate.not_valid_after_utc, got, fingerprint(root.certificate))


def install_ca(home: Path, signed: Path, now: datetime, *, new_root: str = "") -> SignedCa:
    """Sign with the issuing CA in the file `signed` from now on; the present one is trusted until the rotation is
    finished. A coordinator that serves this home takes it over within seconds. `new_root` is the fingerprint of a root
    other than the present one, which is refused if it is not named.

    Raises ConfigError as `request_ca`, IdentityError for a certificate that is not of the key in ca-request/, not below
    its root or not valid now, FingerprintError, ConflictError if a rotation is under way; nothing is changed then.
    """
    config, places = _load_own_home(home), ServerHome(home)
    certificates = certificates_from_pem(read(signed), str(signed))
    if len(certificates) != 2:
        raise IdentityError(
            f"{signed}: holds {len(certificates)} certificates, expected the issuing CA's and its root",
            hint="give the file that 'fedserver ca sign' wrote",
        )
    certificate, root = certificates
    key = _fitting_key(places.ca_request / "issuing.key", certificate, signed)
    verify_chain([certificate], root, str(signed))
    verify_chain([root], root, str(signed))
    check_validity(certificate.not_valid_before_utc, certificate.not_valid_after_utc, now, "new issuing CA")
    if _organisation(certificate) != config.name:
        raise IdentityError(f"{signed}: is of federation {_organisation(certificate)}, not of {config.name}")
    _check_root(places.pki / "root.crt", root, new_root)
    database = open_database(places.database, MIGRATIONS)
    try:
        keeper = AuthorityKeeper(places.pki, config.name, config.certificates.lifetimes())
        keeper.install(Signer(certificate, key), root)
        detail = {"issuer": key_id(certificate), "root": fingerprint(root)}
        fact = Fact("ca.install", "coordinator's machine", object="ca", detail={**detail})
        database.write_now(lambda c: AuditLog(database).append(c, fact))
    finally:
        database.close()
    shutil.rmtree(places.ca_request, ignore_errors=True)
    return SignedCa(certificate.not_valid_after_utc, key_fingerprint(key.public_key()), fingerprint(root))


def _load_own_home(home: Path) -> ServerConfig:
    """The home's configuration. Raises ConfigError for another user's: root's files would be no use to the service."""
    config, owner = load_home(home), home.stat().st_uid
    if owner != os.geteuid():
        raise ConfigError(
            f"{home} belongs to user {_user(owner)}, this is {_user(os.geteuid())}",
            hint=f"run it as that user: runuser -u {_user(owner)} -- fedserver ca ...",
        )
    return config


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _pending_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = key_from_pem(read(path), str(path))
    check_private(path)
    return key


def _fitting_key(path: Path, certificate: x509.Certificate, signed: Path) -> ec.EllipticCurvePrivateKey:
    """The key in ca-request/, if the certificate is of it. Raises ConflictError, IdentityError."""
    if not path.exists():
        raise ConflictError(
            f"no request for an issuing CA waits: {path} is missing",
            hint="begin with: fedserver ca request; if it was installed already, 'fedctl cert ca show' says so",
        )
    key = _pending_key(path)
    public_key = certificate.public_key()
    if not isinstance(public_key, ec.EllipticCurvePublicKey) or spki(public_key) != spki(key.public_key()):
        raise IdentityError(
            f"{signed}: is not of the key that waits in {path.parent}",
            hint="sign the request that 'fedserver ca request' wrote last",
        )
    return key


def _check_root(present: Path, root: x509.Certificate, new_root: str) -> None:
    got = fingerprint(root)
    if root == read_certificate(present):
        return
    if not new_root:
        raise FingerprintError(
            f"the new issuing CA is below another root ({got}) than this federation's; nothing was changed",
            hint="if the root is to be replaced, name it: --new-root FINGERPRINT, as 'fedserver ca root' printed it",
        )
    if not hmac.compare_digest(normalise_fingerprint(new_root), got):
        raise FingerprintError(
            f"the new root has the fingerprint {got}, expected {new_root:.100}; nothing was changed"
        )


def _organisation(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    if len(names) != 1:
        raise IdentityError(f"{certificate.subject.rfc4514_string()}: names no federation")
    return str(names[0].value)


def _write_out(out: Path, data: bytes) -> None:
    try:
        out.write_bytes(data)
    except OSError as error:
        raise ConfigError(f"{out}: can't be written: {error}") from error
