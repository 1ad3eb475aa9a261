"""Keys, certificates and chains: the building blocks that coordinator and sites share. ECDSA P-256, SHA-256.

    root (10 years)
    └── issuing CA (1 year, path length 0)
        ├── coordinator   DNS/IP names, URI spiffe://NAME/coordinator   serverAuth
        ├── site          URI spiffe://NAME/site/ID                     clientAuth
        └── operator      URI spiffe://NAME/operator/ID                 clientAuth

Leaves live 30 days unless the configuration says otherwise.
Every certificate's notBefore lies 10 minutes in the past, for clocks that disagree a little.
"""

import hashlib
import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedcore.errors import ConfigError, FingerprintError, IdentityError

ROOT_LIFETIME = timedelta(days=3652)
ISSUING_LIFETIME = timedelta(days=365)
LEAF_LIFETIME = timedelta(days=30)
BACKDATING = timedelta(minutes=10)

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_HOST_PATTERN = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)
_SIGN_ONLY = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
_CA_USAGE = x509.KeyUsage(False, False, False, False, False, True, True, False, False)


@dataclass(frozen=True, slots=True)
class Signer:
    """A CA's certificate and its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def __repr__(self) -> str:
        return f"Signer({self.certificate.subject.rfc4514_string()})"


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh ECDSA P-256 key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_to_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """PKCS#8, not encrypted: the file's mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def key_from_pem(pem: bytes, source: str) -> ec.EllipticCurvePrivateKey:
    """Read a private key. Raises ConfigError that names `source`."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{source}: not a readable private key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ConfigError(f"{source}: expected an ECDSA P-256 key, got {type(key).__name__}")
    return key


def certificates_to_pem(certificates: Sequence[x509.Certificate]) -> bytes:
    """PEM blocks in the given order."""
    return b"".join(one.public_bytes(serialization.Encoding.PEM) for one in certificates)


def certificates_from_pem(pem: bytes, source: str) -> list[x509.Certificate]:
    """Read one or more certificates. Raises IdentityError that names `source`."""
    try:
        return x509.load_pem_x509_certificates(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"{source}: not a readable certificate: {error}") from error


def spki(key: ec.EllipticCurvePublicKey) -> bytes:
    """The public key as DER: what two keys are compared by."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def key_fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of the public key (DER), lower-case hex: what people compare a request to be let in by."""
    return hashlib.sha256(spki(key)).hexdigest()


def serial_text(certificate: x509.Certificate) -> str:
    """The serial number as lower-case hex, as the registry and the logs write it."""
    return f"{certificate.serial_number:x}"


def key_id(certificate: x509.Certificate) -> str:
    """Identifier of the certificate's own key, lower-case hex. Raises IdentityError if it states none."""
    try:
        stated = certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    except (x509.ExtensionNotFound, ValueError) as error:
        raise IdentityError(f"{certificate.subject.rfc4514_string()}: certificate has no key id") from error
    return stated.hex()


def issuer_key_id(certificate: x509.Certificate) -> str:
    """Identifier of the key that signed the certificate, lower-case hex; empty if it states none."""
    try:
        stated = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    except (x509.ExtensionNotFound, ValueError):
        return ""
    return (stated.key_identifier or b"").hex()


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the DER form, lower-case hex."""
    return hashlib.sha256(certificate.public_bytes(serialization.Encoding.DER)).hexdigest()


def normalise_fingerprint(text: str) -> str:
    """Lower-case hex without colons or a `sha256:` prefix. Raises FingerprintError unless it is 64 digits."""
    digits = text.strip().lower().removeprefix("sha256:").replace(":", "").replace(" ", "")
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise FingerprintError(
            f"CA fingerprint {text!r:.80} is not a SHA-256: expected 64 hex digits",
            hint="copy ca_fingerprint from the answer of 'fedctl enroll token create'",
        )
    return digits


def _subject(common_name: str, federation: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    *,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    now: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATING)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def make_root(federation: str, now: datetime) -> Signer:
    """A self-signed root that may sign one level of CAs."""
    key = new_key()
    name = _subject(f"{federation} root", federation)
    builder = _builder(
        name,
        name,
        key=key.public_key(),
        issuer_key=key.public_key(),
        now=now,
        not_after=now + ROOT_LIFETIME,
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
    builder = builder.add_extension(_CA_USAGE, critical=True)
    return Signer(builder.sign(key, hashes.SHA256()), key)


def make_issuing_ca(root: Signer, federation: str, now: datetime) -> Signer:
    """An issuing CA below `root`, path length 0."""
    key = new_key()
    return Signer(sign_issuing_ca(root, key.public_key(), federation, now), key)


def sign_issuing_ca(
    root: Signer,
    key: ec.EllipticCurvePublicKey,
    federation: str,
    now: datetime,
    lifetime: timedelta = ISSUING_LIFETIME,
) -> x509.Certificate:
    """The certificate of an issuing CA below `root`, path length 0, for a key that may lie elsewhere."""
    builder = _builder(
        _subject(issuing_ca_name(federation), federation),
        root.certificate.subject,
        key=key,
        issuer_key=root.key.public_key(),
        now=now,
        not_after=min(now + lifetime, root.certificate.not_valid_after_utc),
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_CA_USAGE, critical=True)
    return builder.sign(root.key, hashes.SHA256())


def issuing_ca_name(federation: str) -> str:
    """Common name of a federation's issuing CA."""
    return f"{federation} issuing CA"


def make_leaf(
    issuing: Signer,
    key: ec.EllipticCurvePublicKey,
    *,
    federation: str,
    spiffe_id: str,
    hosts: Sequence[str],
    server: bool,
    now: datetime,
    lifetime: timedelta = LEAF_LIFETIME,
) -> x509.Certificate:
    """A certificate for `key`, valid for `lifetime` or as long as the issuing CA.

    `hosts` are DNS names or IP addresses for the SAN; `server` chooses serverAuth over clientAuth.
    Raises ConfigError for a host that is neither.
    """
    builder = _builder(
        _subject(spiffe_id.removeprefix(f"spiffe://{federation}/"), federation),
        issuing.certificate.subject,
        key=key,
        issuer_key=issuing.key.public_key(),
        now=now,
        not_after=min(now + lifetime, issuing.certificate.not_valid_after_utc),
    )
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(spiffe_id)]
    names.extend(_general_name(host) for host in dict.fromkeys(hosts))
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_SIGN_ONLY, critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuing.key, hashes.SHA256())


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    if not _HOST_PATTERN.fullmatch(host):
        raise ConfigError(
            f"host {host!r:.80} is neither a DNS name nor an IP address",
            hint="give the name that sites dial, without scheme or port, such as fed.example.org",
        )
    return x509.DNSName(host)


def make_request(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """A PKCS#10 request, PEM.

    Of a member's, the coordinator uses the public key only; the name is for people who look at it.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


def public_key_of_request(pem: str) -> ec.EllipticCurvePublicKey:
    """The public key of a PKCS#10 request, whose signature is checked. Raises IdentityError."""
    try:
        request = x509.load_pem_x509_csr(pem.encode())
        signed = request.is_signature_valid
        key = request.public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"certificate request can't be read: {error}") from error
    if not signed:
        raise IdentityError("certificate request is not signed by its own key")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError(f"certificate request has a {type(key).__name__}, expected ECDSA P-256")
    return key


def verify_chain(chain: Sequence[x509.Certificate], root: x509.Certificate, who: str) -> None:
    """Check that `chain` (leaf first, then CAs) ends below `root`. Validity in time is checked elsewhere.

    Raises IdentityError that says which link does not hold.
    """
    for child, parent in zip(chain, [*chain[1:], root], strict=True):
        try:
            child.verify_directly_issued_by(parent)
            constraints = parent.extensions.get_extension_for_class(x509.BasicConstraints).value
        except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
            raise IdentityError(
                f"{who}: {child.subject.rfc4514_string()} is not signed by {parent.subject.rfc4514_string()}"
            ) from error
        if not constraints.ca:
            raise IdentityError(
                f"{who}: {parent.subject.rfc4514_string()} is no CA, but signed a certificate"
            )


def root_of(chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate]) -> x509.Certificate:
    """The one of `roots` (at least one) that a chain's last certificate names as its signer; the first if none is."""
    signer = issuer_key_id(chain[-1])
    return next((root for root in roots if key_id(root) == signer), roots[0])
