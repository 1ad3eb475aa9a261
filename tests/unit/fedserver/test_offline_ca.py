"""A root that is kept offline: an issuing CA by files, from the request to the end of the overlap."""

import stat
from datetime import UTC, datetime, timedelta

import pytest

from fedcore.audit_store import AuditLog
from fedcore.credential import load_credential
from fedcore.database import open_database
from fedcore.errors import ConfigError, ConflictError, FingerprintError, IdentityError
from fedcore.identity import Subject
from fedcore.pki import issuer_key_id, key_id, new_key, verify_chain
from fedserver import offline_ca
from fedserver.authority import load_authority
from fedserver.checks import check_home
from fedserver.config import ServerHome
from fedserver.initialise import initialise
from fedserver.offline_ca import install_ca, make_offline_root, request_ca, sign_ca
from fedserver.rotation import AuthorityKeeper, ends_soon
from fedserver.schema import MIGRATIONS

NOW = datetime(2026, 3, 1, tzinfo=UTC)
TERMS = {"host": "h.example", "port": 8443, "enroll_port": 8444, "now": NOW}
SITE, COORDINATOR = Subject("lab", "site", "a"), Subject("lab", "coordinator", "")


class World:
    def __init__(self, folder):
        self.folder = folder
        self.root, self.request, self.signed = (folder / n for n in ("offline", "request.pem", "signed.pem"))
        initialise(folder / "home", name="lab", offline_ca=self.root, **TERMS)
        self.home = ServerHome(folder / "home")

    def keeper(self):
        return AuthorityKeeper(self.home.pki, "lab", {}, lambda: NOW)

    def ask(self):
        return request_ca(self.home.root, self.request)

    def sign(self, root=None, **more):
        return sign_ca(root or self.root, self.request, self.signed, NOW, **more)

    def install(self, **more):
        return install_ca(self.home.root, self.signed, NOW, **more)

    def files(self):
        return {path: path.read_bytes() for path in self.home.pki.rglob("*") if path.is_file()}


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_the_root_key_is_not_left_at_the_coordinator(world):
    assert sorted(path.name for path in world.root.iterdir()) == ["root.crt", "root.key"]
    assert stat.S_IMODE((world.root / "root.key").stat().st_mode) == 0o600
    secret = (world.root / "root.key").read_bytes()
    for path in world.home.root.rglob("*"):
        assert not path.is_file() or secret not in path.read_bytes()
    lines = list(check_home(world.home.root, NOW))
    assert "root's key kept elsewhere" in lines[1]
    assert load_credential(world.home.operator, NOW).ca_pem == (world.root / "root.crt").read_bytes()


def test_a_folder_in_use_or_in_the_home_takes_no_root(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/x").touch()
    for folder, kind in ((tmp_path / "used", ConflictError), (tmp_path / "home/ca", ConfigError)):
        with pytest.raises(kind):
            initialise(tmp_path / "home", name="lab", offline_ca=folder, **TERMS)
        assert not (tmp_path / "home").exists()


def test_rotate_says_what_to_do_instead(world):
    before = world.files()
    with pytest.raises(ConflictError, match="root is kept offline") as caught:
        world.keeper().rotate()
    for command in ("fedserver ca request", "fedserver ca sign", "fedserver ca install", "fedserver ca root"):
        assert command in caught.value.hint
    assert world.files() == before


def test_an_issuing_ca_signed_by_files_overlaps_with_the_old_one_below_the_same_root(world):
    old = world.keeper().current()
    serving = world.keeper()
    asked = world.ask()
    assert world.sign(expected=asked).key_fingerprint == asked
    world.install()
    assert serving.reload(), "a coordinator that serves takes it over"
    world.home.pki.touch()
    assert not serving.reload(), "nothing of it is another"
    new = serving.current()
    assert new.issuer == world.keeper().current().issuer
    assert (new.root, new.roots, new.anchor) == (old.root, [old.root], old.root)
    assert new.issuers == {key_id(old.issuing.certificate), key_id(new.issuing.certificate)}
    for subject in (SITE, COORDINATOR):
        chain = new.issue(subject, new_key().public_key(), NOW)
        verify_chain(chain, old.root, "member")
        assert issuer_key_id(chain[0]) == key_id(new.issuing.certificate)
    serving.finish()
    assert serving.current().issuers == {new.issuer}
    assert not world.home.ca_request.exists()
    private = list(world.home.root.rglob("*.key"))
    assert {stat.S_IMODE(path.stat().st_mode) for path in private} == {0o600}
    database = open_database(world.home.database, MIGRATIONS)
    try:
        actions = [entry.document["action"] for entry in AuditLog(database).walk(0)]
    finally:
        database.close()
    assert actions == ["ca.install"]


def test_a_request_is_repeated_until_its_certificate_is_installed(world, monkeypatch):
    asked = world.ask()
    assert world.ask() == asked
    world.home.ca_request.joinpath("issuing.key").chmod(0o644)
    with pytest.raises(ConfigError, match="private key with mode 0644"):
        world.ask()
    world.home.ca_request.joinpath("issuing.key").chmod(0o600)
    world.sign()
    monkeypatch.setattr(offline_ca.shutil, "rmtree", lambda *a, **k: None)  # killed before the last step
    world.install()
    assert world.ask() != asked, "a key that is in use is not certified again"


def test_what_is_signed_is_what_the_coordinator_asked_for(world, tmp_path):
    world.ask()
    with pytest.raises(FingerprintError, match="nothing was signed"):
        world.sign(expected="ab" * 32)
    make_offline_root(tmp_path / "other", "other", NOW)
    with pytest.raises(
        ConflictError, match="asks for 'lab issuing CA', but the root in .* of federation other"
    ):
        world.sign(tmp_path / "other")
    (world.root / "root.key").chmod(0o640)
    with pytest.raises(ConfigError, match="private key with mode 0640"):
        world.sign()
    (world.root / "root.key").chmod(0o600)
    with pytest.raises(IdentityError, match="root: certificate ended"):
        sign_ca(world.root, world.request, world.signed, NOW + timedelta(days=3700))
    assert not world.signed.exists()
    world.request.write_text("rubbish")
    with pytest.raises(IdentityError, match="certificate request can't be read"):
        world.sign()


def test_the_coordinator_s_files_stay_its_user_s(world, monkeypatch):
    monkeypatch.setattr(offline_ca.os, "geteuid", lambda: world.home.root.stat().st_uid + 1)
    for step in (world.ask, lambda: install_ca(world.home.root, world.home.pki / "issuing.crt", NOW)):
        with pytest.raises(ConfigError, match="belongs to user") as caught:
            step()
        assert "runuser -u" in caught.value.hint


def test_only_a_fitting_certificate_is_installed(world, tmp_path):
    before = world.files()
    world.ask()
    world.sign()
    early, present = world.signed.read_bytes(), (world.home.pki / "issuing.crt").read_bytes()
    world.signed.write_bytes(present)
    with pytest.raises(IdentityError, match="holds 1 certificates"):
        world.install()
    world.signed.write_bytes(present + (world.root / "root.crt").read_bytes())
    with pytest.raises(IdentityError, match="is not of the key that waits"):
        world.install()
    world.signed.write_bytes(early)
    with pytest.raises(IdentityError, match="new issuing CA: certificate ended"):
        install_ca(world.home.root, world.signed, NOW + timedelta(days=366))
    (world.home.ca_request / "issuing.key").unlink()
    with pytest.raises(ConflictError, match="no request for an issuing CA waits"):
        world.install()
    assert world.files() == before


def test_another_root_must_be_named_and_is_then_moved_to_with_both_trusted(world, tmp_path):
    old = world.keeper().current()
    named = make_offline_root(tmp_path / "new", "lab", NOW)
    world.ask()
    world.sign(tmp_path / "new")
    with pytest.raises(FingerprintError, match="below another root .* nothing was changed"):
        world.install()
    with pytest.raises(FingerprintError, match="nothing was changed"):
        world.install(new_root="ab" * 32)
    world.install(new_root=named)
    moving = load_authority(world.home.pki, "lab")
    assert (moving.roots, moving.anchor) == ([moving.root, old.root], old.root)
    verify_chain(moving.issue(COORDINATOR, new_key().public_key(), NOW), old.root, "coordinator")
    verify_chain(moving.issue(SITE, new_key().public_key(), NOW), moving.root, "site")
    world.ask()
    world.sign(tmp_path / "new")
    with pytest.raises(ConflictError, match="under way already"):
        world.install(new_root=named)


def test_the_end_of_the_ca_is_told_well_before(world):
    authority = world.keeper().current()

    def told(days, offline=True):
        return ends_soon(authority, NOW + timedelta(days=days), offline=offline)

    assert told(300) == []
    (line,) = told(310)
    assert "the issuing CA ends on 2027-03-01, in 55 days" in line
    assert "fedserver ca request" in line
    assert "fedctl cert ca rotate" in told(310, offline=False)[0]
    assert "ended on 2027-03-01" in told(366)[0]
    assert any("the root ends on 2036-02-29" in line for line in told(3652 - 100))
    assert any(line.startswith("bad the issuing CA ends on") for line in check_lines(world, 310))


def check_lines(world, days):
    return list(check_home(world.home.root, NOW + timedelta(days=days)))
