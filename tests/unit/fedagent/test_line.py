"""What `doctor` says of a line that is broken, one break at a time, against real sockets and real TLS."""

import contextlib
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedagent.doctor import Answer, check_clock, check_disk, check_protocol, check_shm
from fedagent.line import Line, check_dns, check_inspection, check_tcp, check_tls
from fedcore.finding import Verdict
from fedcore.pki import certificates_to_pem, key_to_pem
from fedcore.protocol import PROTOCOL_KEY, TIME_KEY


def certificate(
    name: str, issuer: tuple[str, ec.EllipticCurvePrivateKey] | None = None
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A certificate for 127.0.0.1, signed by itself or by `issuer`."""
    key = ec.generate_private_key(ec.SECP256R1())
    issuer_name, issuer_key = issuer or (name, key)
    now = datetime.now(UTC)

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(issuer_name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
    )
    return builder.sign(issuer_key, hashes.SHA256()), key


@pytest.fixture
def credential(tmp_path: Path) -> Path:
    """A folder with the root of a federation and a certificate of its own; and the coordinator's, beside it."""
    root, root_key = certificate("lab root")
    for folder in ("site", "coordinator"):
        leaf, key = certificate(folder, ("lab root", root_key))
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "ca.crt").write_bytes(certificates_to_pem([root]))
        (tmp_path / folder / "tls.crt").write_bytes(certificates_to_pem([leaf]))
        (tmp_path / folder / "tls.key").write_bytes(key_to_pem(key))
    foreign, key = certificate("Corp Inspection CA")
    (tmp_path / "proxy").mkdir()
    (tmp_path / "proxy" / "tls.crt").write_bytes(certificates_to_pem([foreign]))
    (tmp_path / "proxy" / "tls.key").write_bytes(key_to_pem(key))
    return tmp_path / "site"


@contextlib.contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server on loopback that gives each connection to `serve`."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(OSError):
                    serve(connection)

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def tls(folder: Path) -> Callable[[socket.socket], None]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured:
            secured.recv(1)

    return serve


def test_the_coordinator_itself_is_recognised(credential):
    with listening(tls(credential.parent / "coordinator")) as port:
        line = Line("127.0.0.1", port, None)
        findings = (
            check_dns(line),
            check_tcp(line),
            check_tls(line, credential),
            check_inspection(line, credential),
        )
        assert [str(found) for found in findings if found.verdict is not Verdict.OK] == []


def test_a_proxy_that_opens_tls_is_named(credential):
    with listening(tls(credential.parent / "proxy")) as port:
        line = Line("127.0.0.1", port, None)
        assert check_tls(line, credential).verdict is Verdict.FAILED
        found = check_inspection(line, credential)
    assert found.verdict is Verdict.FAILED
    assert "'CN=Corp Inspection CA'" in found.text
    assert "proxy or firewall opens TLS" in found.hint


def test_what_is_no_tls_is_told_without_an_exception(credential):
    with listening(lambda connection: connection.sendall(b"220 mail ready\r\n")) as port:
        line = Line("127.0.0.1", port, None)
        assert check_tcp(line).verdict is Verdict.OK
        assert check_tls(line, credential).verdict is Verdict.FAILED
        assert check_inspection(line, credential).verdict is Verdict.SKIPPED


def test_nobody_there(credential):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    line = Line("127.0.0.1", port, None)
    assert "refused" in check_tcp(line).text
    assert check_tls(line, credential).verdict is Verdict.FAILED
    assert check_dns(Line("coordinator.invalid", 1, None)).verdict is Verdict.FAILED


def test_through_a_proxy_and_past_one_that_refuses(credential):
    def refuses(connection: socket.socket) -> None:
        connection.recv(1024)
        connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

    asked: list[bytes] = []
    secured = tls(credential.parent / "coordinator")

    def lets_through(connection: socket.socket) -> None:
        asked.append(connection.recv(1024))
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        secured(connection)

    with listening(refuses) as port:
        found = check_tcp(Line("127.0.0.1", 8443, f"http://127.0.0.1:{port}"))
        assert "403 Forbidden" in found.text
        assert "CONNECT" in found.hint
    with listening(lets_through) as port:
        line = Line("127.0.0.1", 8443, f"http://127.0.0.1:{port}")
        assert check_tls(line, credential).verdict is Verdict.OK
        assert asked[0].startswith(b"CONNECT 127.0.0.1:8443 HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("skew_s", "verdict", "words"),
    [(0.4, "ok", "0.4 s ahead of"), (-30.0, "warn", "30.0 s behind"), (3600.0, "FAIL", "3600.0 s ahead of")],
)
def test_the_clock_is_held_against_the_coordinators(skew_s, verdict, words):
    # Asked at 1000 and answered at 1002 by this machine's clock: the coordinator's 1001 lies in the middle.
    found = check_clock(Answer(1000.0 + skew_s, 1002.0 + skew_s, {TIME_KEY: "1001.0"}))
    assert (found.verdict, words in found.text) == (verdict, True)


@pytest.mark.parametrize("said", [{}, {TIME_KEY: "soon"}])
def test_a_coordinator_that_tells_no_time(said):
    assert check_clock(Answer(0.0, 0.0, said)).verdict is Verdict.SKIPPED
    assert check_clock(None).verdict is Verdict.SKIPPED


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [
        ("1.0", "FAIL"),
        ("1.1", "ok"),
        ("1.2", "ok"),
        ("1.3", "FAIL"),
        ("2.0", "FAIL"),
        ("x", "skip"),
        ("", "skip"),
    ],
)
def test_versions_that_talk_to_each_other(theirs, verdict):
    assert check_protocol(Answer(0.0, 0.0, {PROTOCOL_KEY: theirs})).verdict == verdict


def test_room_on_disk(tmp_path, monkeypatch):
    def free(amount: int) -> None:
        monkeypatch.setattr(
            "shutil.disk_usage", lambda path: type("Usage", (), {"free": amount, "total": 10**11})
        )

    for amount, verdict in ((10**10, "ok"), (10**9, "warn"), (10**8, "FAIL")):
        free(amount)
        assert check_disk(tmp_path).verdict == verdict
    assert check_shm(tmp_path).verdict == "ok"
    monkeypatch.undo()
    assert check_shm(tmp_path / "none").verdict == "warn"
