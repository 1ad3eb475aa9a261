"""Credential folders are consistent or refused, and replaced as a whole."""

import errno
import socket
import threading
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore import credential as credential_module
from fedcore.channel import client_options, open_enrollment_channel
from fedcore.credential import join_address, load_credential, split_address, write_credential
from fedcore.enrollment_token import EnrollmentToken, decode_token
from fedcore.errors import ConfigError, ConflictError, IdentityError, TokenError
from fedcore.identity import Subject
from fedcore.pki import certificates_to_pem, key_to_pem, make_issuing_ca, make_leaf, make_root, new_key

NOW = datetime(2026, 5, 1, tzinfo=UTC)
ROOT = make_root("lab", NOW)
ISSUING = make_issuing_ca(ROOT, "lab", NOW)
SITE = Subject("lab", "site", "clinic-a")


def write(folder, subject=SITE, **more):
    key = new_key()
    leaf = make_leaf(
        ISSUING, key.public_key(), federation="lab", spiffe_id=SITE.spiffe_id, hosts=(), server=False, now=NOW
    )
    terms = {"chain": [leaf, ISSUING.certificate], "roots": [ROOT.certificate], "key": key, **more}
    write_credential(folder, coordinator="fed.example.org:8443", subject=subject, **terms)
    return folder


def test_what_is_written_is_read_back(tmp_path):
    credential = load_credential(write(tmp_path / "home" / "credential"), NOW)
    assert credential.coordinator == "fed.example.org:8443"
    assert credential.subject == SITE
    assert credential.federation == "lab"
    assert "PRIVATE" not in repr(credential)
    modes = {path.name: path.stat().st_mode & 0o777 for path in credential.folder.iterdir()}
    assert modes == {"tls.key": 0o600, "tls.crt": 0o644, "ca.crt": 0o644, "credential.toml": 0o644}
    assert credential.folder.stat().st_mode & 0o777 == 0o700


def test_a_credential_is_replaced_only_when_asked_and_as_a_whole(tmp_path):
    folder = write(tmp_path / "credential")
    before = load_credential(folder, NOW)
    with pytest.raises(ConflictError, match="already there"):
        write(folder)
    assert load_credential(folder, NOW).key_pem == before.key_pem
    write(folder, replace=True)
    assert load_credential(folder, NOW).key_pem != before.key_pem
    assert [path.name for path in tmp_path.iterdir()] == ["credential"]


@pytest.mark.parametrize("name", ["ca.crt", "tls.crt", "tls.key", "credential.toml"])
def test_missing_and_damaged_files_are_named(tmp_path, name):
    folder = write(tmp_path / "credential")
    (folder / name).write_text("rubbish = [")
    with pytest.raises((ConfigError, IdentityError), match=name):
        load_credential(folder, NOW)
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=name):
        load_credential(folder, NOW)


def test_parts_that_do_not_belong_together_are_refused(tmp_path):
    folder = write(tmp_path / "credential")
    (folder / "tls.key").write_bytes(key_to_pem(new_key()))
    with pytest.raises(IdentityError, match="not of this private key"):
        load_credential(folder, NOW)
    write(folder, replace=True)
    (folder / "ca.crt").write_bytes(certificates_to_pem([make_root("lab", NOW).certificate]))
    with pytest.raises(IdentityError, match="is not signed by"):
        load_credential(folder, NOW)
    write(folder, replace=True, subject=Subject("lab", "operator", "clinic-a"))
    with pytest.raises(
        IdentityError, match="names spiffe://lab/site/clinic-a, expected spiffe://lab/operator"
    ):
        load_credential(folder, NOW)
    write(folder, replace=True, roots=[ROOT.certificate])


def test_two_roots_are_trusted_while_a_federation_moves_to_a_new_one(tmp_path):
    folder = tmp_path / "credential"
    write(folder, roots=[make_root("lab", NOW).certificate, ROOT.certificate])
    assert load_credential(folder, NOW).subject.id == "clinic-a"


def test_an_ended_credential_is_refused_unless_it_is_only_shown(tmp_path):
    folder = write(tmp_path / "credential")
    late = NOW + timedelta(days=31)
    with pytest.raises(IdentityError, match="certificate ended") as caught:
        load_credential(folder, late)
    assert "enrol again" in caught.value.hint
    assert load_credential(folder, late, allow_expired=True).subject == SITE


def test_credential_toml_knows_no_other_keys_and_wants_an_address(tmp_path):
    folder = write(tmp_path / "credential")
    text = (folder / "credential.toml").read_text()
    (folder / "credential.toml").write_text(text + "extra = 1\n")
    with pytest.raises(ConfigError, match="unknown key 'extra'"):
        load_credential(folder, NOW)
    (folder / "credential.toml").write_text(text.replace(":8443", ""))
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        load_credential(folder, NOW)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:1", ("a", 1)),
        ("[::1]:65535", ("::1", 65535)),
        (" fed.example.org:8443\n", ("fed.example.org", 8443)),
    ],
)
def test_addresses(text, expected):
    assert split_address(text) == expected
    assert join_address(*expected) == text.strip()


@pytest.mark.parametrize(
    "text", ["", "a", ":1", "a:", "a:0", "a:65536", "a:x", "::1:80", "https://a:1", "a b:1", "a:1/x", "a:²"]
)
def test_what_is_no_address(text):
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        split_address(text)


def test_only_a_proxy_that_was_configured_is_used():
    assert ("grpc.enable_http_proxy", 0) in client_options()
    options = dict(client_options("http://p:3128"))
    assert options["grpc.http_proxy"] == "http://p:3128"
    assert "grpc.enable_http_proxy" not in options
    for proxy in ("p:3128", "https://p:3128", "http://p", "http://user:secret@p"):
        with pytest.raises(ConfigError, match="http://HOST:PORT") as caught:
            client_options(proxy)
        assert "secret" not in str(caught.value)


def test_the_environments_proxy_sees_no_connection(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy, socket.create_server(("127.0.0.1", 0)) as there:
        proxy.settimeout(60)
        there.settimeout(60)
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        for name in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(name, address)
        for name in ("no_proxy", "no_grpc_proxy"):
            monkeypatch.delenv(name, raising=False)
        ca_pem = certificates_to_pem([ROOT.certificate])
        dialled = f"127.0.0.1:{there.getsockname()[1]}"
        for configured, expected in ((None, there), (address, proxy)):
            with open_enrollment_channel(dialled, ca_pem, proxy=configured) as channel:
                # A call dials; watching the channel would leave a thread behind that minds its being closed.
                call = channel.unary_unary("/nobody/Answers").future(b"", timeout=60, wait_for_ready=True)
                expected.accept()[0].close()
                call.cancel()
        proxy.settimeout(0)
        with pytest.raises(BlockingIOError):
            for _ in range(9):
                proxy.accept()


TOKEN = EnrollmentToken(
    "00" * 8, "s" * 43, "clinic-a", 8444, certificates_to_pem([ROOT.certificate]).decode()
)


def test_a_token_is_read_back_however_it_was_wrapped():
    text = TOKEN.encode()
    assert decode_token(text) == TOKEN
    assert decode_token(f"  {text[:80]}\n{text[80:]} \n") == TOKEN
    assert TOKEN.secret not in repr(TOKEN)


@given(st.integers(0, len(TOKEN.encode()) - 1))
def test_a_token_that_was_cut_off_is_refused(length):
    with pytest.raises(TokenError):
        decode_token(TOKEN.encode()[:length])


@given(st.text(max_size=200))
def test_anything_else_is_no_token_and_is_not_repeated(text):
    with pytest.raises(TokenError) as caught:
        decode_token(text)
    assert caught.value.__cause__ is None


def test_a_key_that_others_may_read_is_refused(tmp_path):
    folder = tmp_path / "credential"
    write(folder)
    for mode in (0o640, 0o604, 0o660):
        (folder / "tls.key").chmod(mode)
        with pytest.raises(ConfigError, match=f"private key with mode {mode:04o}, expected 0600") as caught:
            load_credential(folder, NOW)
        assert f"chmod 600 {folder / 'tls.key'}" in caught.value.hint
    (folder / "tls.key").chmod(0o400)
    load_credential(folder, NOW)


def test_readers_never_meet_half_a_credential_while_it_is_replaced(tmp_path):
    """A writer replaces the folder, each time with another key, while a reader loads it again and again."""
    folder = tmp_path / "credential"
    write(folder)
    stop = threading.Event()

    def replace():
        while not stop.is_set():
            write(folder, replace=True)

    writer = threading.Thread(target=replace)
    writer.start()
    try:
        seen = set()
        while len(seen) < 10:  # pytest's timeout ends what never comes
            seen.add(load_credential(folder, NOW).certificate.serial_number)
    finally:
        stop.set()
        writer.join()
    assert [path.name for path in tmp_path.iterdir()] == ["credential"]


def test_where_folders_cannot_be_exchanged_a_crash_between_the_renames_is_mended(tmp_path, monkeypatch):
    folder = tmp_path / "credential"
    write(folder)
    first = load_credential(folder, NOW).certificate

    def unsupported(one, other):
        raise OSError(errno.EINVAL, "not on NFS")

    monkeypatch.setattr(credential_module, "exchange", unsupported)
    write(folder, replace=True)
    second = load_credential(folder, NOW).certificate
    assert second != first
    folder.rename(tmp_path / ".credential.old")  # killed after the first of the two renames
    assert load_credential(folder, NOW).certificate == second
    assert folder.is_dir()
