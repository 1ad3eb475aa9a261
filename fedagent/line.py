"""The line from this site to the coordinator, looked at from below gRPC: name, connection, TLS, who shows which certificate.

Through the HTTP proxy of agent.toml if there is one. Every function returns what it found and raises nothing for it.
"""

import contextlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509

from fedcore.credential import join_address
from fedcore.errors import ForeignCertificateError
from fedcore.finding import Finding, bad, good, skipped
from fedcore.text import printable

_TIMEOUT_S = 5.0
_MAX_ANSWER_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Line:
    """Where the coordinator is, and the way there."""

    host: str
    port: int
    proxy: str | None

    @property
    def target(self) -> tuple[str, int]:
        """What this machine itself dials: the proxy if there is one."""
        if self.proxy:
            parts = urlsplit(self.proxy)
            return parts.hostname or "", parts.port or 0
        return self.host, self.port


def check_dns(line: Line) -> Finding:
    """Whether the name that this machine dials leads to an address."""
    name = "dns"
    host, port = line.target
    try:
        found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError as error:
        return bad(name, f"{host} has no address: {error.strerror}", "mend DNS, or add it to /etc/hosts")
    through = " (the proxy; it looks the coordinator up)" if line.proxy else ""
    return good(name, f"{host} is {', '.join(sorted(found))}{through}")


def check_tcp(line: Line) -> Finding:
    """Whether a connection can be made, through the proxy if there is one."""
    name, where = "tcp", join_address(line.host, line.port)
    try:
        with _connected(line):
            through = f" through {join_address(*line.target)}" if line.proxy else ""
            return good(name, f"{where} answers{through}")
    except OSError as error:
        hint = "let the proxy CONNECT there" if line.proxy else "open the firewall outwards to that port"
        return bad(name, f"{where}: {error}", hint)


def check_tls(line: Line, credential: Path) -> Finding:
    """Whether TLS 1.3 succeeds with the folder's credential, and the federation's root as the only one."""
    name, where = "tls", join_address(line.host, line.port)
    context = ssl.create_default_context(cafile=str(credential / "ca.crt"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # The federation's certificates are held to gRPC's rules, which know no such demands on key usage.
    context.verify_flags &= ~getattr(ssl, "VERIFY_X509_STRICT", 0)
    try:
        context.load_cert_chain(credential / "tls.crt", credential / "tls.key")
        with _connected(line) as raw, context.wrap_socket(raw, server_hostname=line.host) as secured:
            return good(name, f"{secured.version()}, the chain leads to the federation's root")
    except ssl.SSLCertVerificationError as error:
        return bad(name, f"{where}: {error.verify_message}", "see the line 'inspection'")
    except (ssl.SSLError, OSError) as error:
        return bad(name, f"{where}: {error}", "is that the coordinator's port, and is it serving?")


def check_inspection(line: Line, credential: Path) -> Finding:
    """Whether something between opens TLS: the certificate shown is then not of the federation's making."""
    name = "inspection"
    own_pem = (credential / "ca.crt").read_bytes() + (credential / "tls.crt").read_bytes()
    try:
        foreign = _foreign_certificate(line, own_pem)
    except (ssl.SSLError, OSError, ValueError) as error:
        return skipped(name, f"no certificate was shown: {error}")
    if foreign is None:
        return good(name, "none: the certificate shown is the federation's own")
    return bad(name, foreign.message, foreign.hint)


def explain_foreign_certificate(
    error: ForeignCertificateError, line: Line, own_pem: bytes
) -> ForeignCertificateError:
    """The error that gRPC met, or, if a look at the line tells, one that names who issued what is shown there.

    `own_pem`: the federation's root, and its issuing CA if known. Blocks for some seconds at most.
    """
    try:
        return _foreign_certificate(line, own_pem) or error
    except (ssl.SSLError, OSError, ValueError):
        return error


def _foreign_certificate(line: Line, own_pem: bytes) -> ForeignCertificateError | None:
    """What is wrong with the certificate shown at the other end, if none of the certificates `own_pem` issued it.

    Raises ssl.SSLError, OSError, ValueError if no certificate is shown.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # only to look at what is shown
    with _connected(line) as raw, context.wrap_socket(raw, server_hostname=line.host) as secured:
        shown = x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")
    issuer = shown.issuer.rfc4514_string()
    if issuer in {own.subject.rfc4514_string() for own in x509.load_pem_x509_certificates(own_pem)}:
        return None
    through = " through the proxy" if line.proxy else ""
    return ForeignCertificateError(
        f"{join_address(line.host, line.port)}{through} shows a certificate chain that is not the federation's: "
        f"issued by {printable(issuer, 200)!r}",
        hint="most likely a proxy or firewall opens TLS to inspect it: have "
        f"{line.host} excepted there; or that is the address of another service, or the credential or token is not of "
        "this federation",
    )


def shown_chain(line: Line) -> list[x509.Certificate]:
    """The certificates that are shown there, the server's own first, none of them verified.

    Raises OSError (ssl.SSLError is one) if there is no connection or no TLS 1.3.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the caller checks what is shown
    with _connected(line) as raw, context.wrap_socket(raw, server_hostname=line.host) as secured:
        if hasattr(secured, "get_unverified_chain"):  # Python 3.13
            return [x509.load_der_x509_certificate(der) for der in secured.get_unverified_chain()]
        # The same, before it was given a public name.
        shown = secured._sslobj.get_unverified_chain() or ()  # type: ignore[attr-defined]
        return [x509.load_pem_x509_certificate(one.public_bytes().encode()) for one in shown]


@contextlib.contextmanager
def _connected(line: Line) -> Iterator[socket.socket]:
    """A connection to the coordinator. Raises OSError."""
    with socket.create_connection(line.target, _TIMEOUT_S) as raw:
        if line.proxy:
            _ask_proxy(raw, join_address(line.host, line.port))
        yield raw


def _ask_proxy(raw: socket.socket, where: str) -> None:
    raw.sendall(f"CONNECT {where} HTTP/1.1\r\nHost: {where}\r\n\r\n".encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        part = raw.recv(1024)
        answer += part
        if not part or len(answer) > _MAX_ANSWER_BYTES:
            raise OSError("the proxy broke off its answer to CONNECT")
    words = answer.split(b"\r\n", 1)[0].decode("ascii", "replace").split(" ", 2)
    if len(words) < 2 or words[1] != "200":
        raise OSError(f"the proxy refuses CONNECT: {' '.join(words)[:100]!r}")
