"""The move to a new CA on disk: each step whole or not at all, and found again by whoever starts next."""

import asyncio
import os
from datetime import UTC, datetime, timedelta

import pytest

from fedcore.credential import load_credential
from fedcore.database import open_database
from fedcore.errors import ConfigError, ConflictError, StorageError
from fedcore.identity import Subject
from fedcore.pki import fingerprint, issuer_key_id, key_id, new_key, verify_chain
from fedserver import rotation
from fedserver.authority import load_authority
from fedserver.certificates import Certificates
from fedserver.config import ServerHome
from fedserver.initialise import initialise
from fedserver.own_certificate import OwnCertificate
from fedserver.rotation import AuthorityKeeper
from fedserver.schema import MIGRATIONS

NOW = datetime(2026, 3, 1, tzinfo=UTC)
SITE, COORDINATOR = Subject("lab", "site", "a"), Subject("lab", "coordinator", "")


@pytest.fixture
def home(tmp_path):
    initialise(tmp_path / "home", name="lab", host="h.example", port=8443, enroll_port=8444, now=NOW)
    return ServerHome(tmp_path / "home")


def keeper(home):
    return AuthorityKeeper(home.pki, "lab", {}, lambda: NOW)


def issued(authority, subject):
    return authority.issue(subject, new_key().public_key(), NOW)


def test_during_the_overlap_members_get_the_new_ca_and_the_coordinator_keeps_the_old(home):
    ours = keeper(home)
    old = ours.current()
    ours.rotate()
    new = ours.current()
    assert new.roots == [new.root, old.root]
    assert fingerprint(new.root) != fingerprint(old.root)
    assert new.root_fingerprint == old.root_fingerprint, (
        "new members pin the root of the coordinator's certificate"
    )
    assert new.issuers == {key_id(old.issuing.certificate), key_id(new.issuing.certificate)}
    verify_chain(issued(new, SITE), new.root, "site")
    verify_chain(issued(new, COORDINATOR), old.root, "coordinator")
    for certificate in (issued(old, SITE)[0], issued(new, SITE)[0]):
        assert new.issuer_of(certificate) == issuer_key_id(certificate)


def test_finishing_leaves_the_new_ca_only(home):
    ours = keeper(home)
    old = issued(ours.current(), SITE)[0]
    ours.rotate()
    ours.finish()
    done = ours.current()
    assert done.previous is None
    assert done.issuer_of(old) == ""
    verify_chain(issued(done, COORDINATOR), done.root, "coordinator")
    assert sorted(path.name for path in home.pki.iterdir()) == [
        "issuing.crt", "issuing.key", "root.crt", "root.key",
    ]  # fmt: skip


def test_each_step_is_refused_out_of_turn(home):
    ours = keeper(home)
    with pytest.raises(ConflictError, match="no rotation of the CA is under way"):
        ours.finish()
    ours.rotate()
    with pytest.raises(ConflictError, match="under way already"):
        ours.rotate()


def test_whoever_starts_next_finds_the_rotation_with_private_keys_private(home):
    ours = keeper(home)
    ours.rotate()
    again = load_authority(home.pki, "lab")
    assert again.roots == ours.current().roots
    keys = sorted(home.pki.rglob("*.key"))
    assert [str(key.relative_to(home.pki)) for key in keys] == [
        "issuing.key", "previous/issuing.key", "previous/root.key", "root.key",
    ]  # fmt: skip
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}
    keys[1].chmod(0o644)
    with pytest.raises(ConfigError, match="private key with mode 0644, expected 0600"):
        load_authority(home.pki, "lab")


def test_a_failure_in_either_step_changes_nothing(home, monkeypatch):
    ours = keeper(home)
    old = ours.current()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(rotation, "exchange", fail)
    with pytest.raises(StorageError, match="nothing was changed: disk full"):
        ours.rotate()
    assert ours.current() is old
    assert load_authority(home.pki, "lab").root == old.root
    assert [name for name in os.listdir(home.root) if name.startswith(".pki")] == []


def test_a_coordinator_killed_between_the_two_halves_of_a_step_mends_itself_at_start(home):
    """The CA was replaced, the coordinator's own credential not yet: `prepare` makes them agree."""
    database = open_database(home.database, MIGRATIONS)
    try:
        ours = keeper(home)
        certificates = Certificates(database, ours.current, lambda: NOW)
        for step, roots in ((ours.rotate, 2), (ours.finish, 1)):
            step()
            own = OwnCertificate(home.credential, "h.example", certificates, lambda: NOW)
            asyncio.run(own.prepare())
            credential = load_credential(home.credential, NOW)
            assert credential.ca_pem.count(b"BEGIN CERTIFICATE") == roots
            assert own.current().certificate == credential.certificate
            serial = credential.certificate.serial_number
            asyncio.run(own.prepare())
            assert own.current().certificate.serial_number == serial, "nothing left to do"
    finally:
        database.close()


def test_a_coordinator_whose_certificate_ended_while_it_was_off_renews_before_it_serves(home):
    database = open_database(home.database, MIGRATIONS)
    later = NOW + timedelta(days=40)
    try:
        certificates = Certificates(database, keeper(home).current, lambda: later)
        own = OwnCertificate(home.credential, "h.example", certificates, lambda: later)
        asyncio.run(own.prepare())
        assert load_credential(home.credential, later).subject == COORDINATOR
        newest, first = certificates.rows()[0], certificates.rows()[-1]
        assert newest.role == "coordinator"
        assert newest.renews in {row.serial for row in certificates.rows()}
        assert first.state(later) == "ended"
    finally:
        database.close()
