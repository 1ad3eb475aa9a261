"""The registry of certificates: what counts, renewal, revocation, and renewal of what has ended; on a real database."""

import asyncio
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from fedcore.database import open_database
from fedcore.errors import ConflictError, IdentityError, NotFoundError
from fedcore.identity import Caller, Subject
from fedcore.pki import certificates_to_pem, issuer_key_id, make_request, new_key, serial_text
from fedcore.renewal import ended_statement, sign_statement
from fedserver.authority import create_authority
from fedserver.certificates import Certificates, Owner
from fedserver.schema import MIGRATIONS

NOW = datetime(2026, 3, 1, tzinfo=UTC)
SITE, OPERATOR = Subject("lab", "site", "clinic-a"), Subject("lab", "operator", "ann")


class World:
    def __init__(self, folder):
        self.now = NOW
        self.database = open_database(folder / "db", MIGRATIONS, create=True)
        self.authority = create_authority(folder / "pki", "lab", NOW)
        self.certificates = Certificates(self.database, lambda: self.authority, lambda: self.now)
        self.key = new_key()

    def issue(self, subject=SITE, key=None):
        return asyncio.run(self.certificates.issue(subject, (key or self.key).public_key()))[0]

    def renew(self, certificate):
        csr_pem = make_request(new_key(), "x").decode()
        return asyncio.run(self.certificates.renew(caller(certificate), csr_pem))[0]

    def renew_ended(self, certificate, key=None):
        csr_pem = make_request(new_key(), "x").decode()
        statement = ended_statement("lab", serial_text(certificate), csr_pem)
        pem = certificates_to_pem([certificate]).decode()
        signature = sign_statement(key or self.key, statement)
        return asyncio.run(self.certificates.renew_ended(pem, csr_pem, signature))

    def revoke(self, certificate, by=None):
        by = by or caller(self.issue(OPERATOR))
        return asyncio.run(self.certificates.revoke(serial_text(certificate), by=by, reason="stolen"))

    def states(self):
        return {row.serial: row.state(self.now) for row in self.certificates.rows()}


def caller(certificate, role=None):
    from fedcore.identity import subject_of

    subject = subject_of(certificate)
    return Caller(
        subject.federation, role or subject.role, subject.id, serial_text(certificate),
        certificate.not_valid_after_utc, issuer_key_id(certificate),
    )  # fmt: skip


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.database.close()


def test_only_what_was_issued_here_counts(world, tmp_path):
    certificate = world.issue()
    world.certificates.check(caller(certificate))
    foreign = create_authority(tmp_path / "other", "lab", NOW).issue(SITE, new_key().public_key(), NOW)[0]
    with pytest.raises(IdentityError, match="not in this coordinator's registry"):
        world.certificates.check(caller(foreign))
    with pytest.raises(IdentityError, match="not in this coordinator's registry"):
        world.certificates.check(caller(certificate, role="operator"))


def test_a_certificate_of_a_dropped_ca_no_longer_counts_even_if_it_was_found_good(world, tmp_path):
    certificate = world.issue()
    world.certificates.check(caller(certificate))
    world.authority = create_authority(tmp_path / "new", "lab", NOW)
    with pytest.raises(IdentityError, match="which this federation no longer trusts"):
        world.certificates.check(caller(certificate))


def test_a_revoked_certificate_is_refused_from_then_on_with_who_and_why(world):
    certificate = world.issue()
    world.certificates.check(caller(certificate))
    rows, changed = world.revoke(certificate)
    assert (changed, [row.state(NOW) for row in rows]) == (1, ["revoked"])
    with pytest.raises(IdentityError, match="site/clinic-a: certificate .* was revoked at .* by ann: stolen"):
        world.certificates.check(caller(certificate))
    assert world.revoke(certificate)[1] == 0, "again: nothing to do"
    world.certificates.check(caller(world.issue()))  # a new enrolment is not affected


def test_what_was_renewed_from_a_revoked_certificate_is_revoked_with_it(world):
    first = world.issue()
    second = world.renew(first)
    third = world.renew(second)
    other = world.issue()
    rows, changed = world.revoke(first)
    assert changed == 3
    assert {row.serial for row in rows} == {serial_text(one) for one in (first, second, third)}
    for one in (first, second, third):
        with pytest.raises(IdentityError, match="revoked"):
            world.certificates.check(caller(one))
    world.certificates.check(caller(other))
    with pytest.raises(IdentityError, match="revoked"):
        world.renew(third)


def test_renewal_keeps_the_old_certificate_and_says_what_took_its_place(world):
    old = world.issue()
    new = world.renew(old)
    assert serial_text(new) != serial_text(old)
    world.certificates.check(caller(old))  # the answer may have got lost
    world.certificates.check(caller(new))
    row = world.certificates.one(serial_text(old)[:10])
    assert (row.replaced_by, row.state(NOW)) == (serial_text(new), "replaced")
    assert world.certificates.one(serial_text(new)).renews == serial_text(old)


def test_all_of_a_site_are_revoked_by_its_name(world):
    certificates = [world.issue(), world.issue()]
    neighbour = world.issue(Subject("lab", "site", "clinic-b"))
    by = caller(world.issue(OPERATOR))
    owner = Owner("site", "clinic-a")
    rows, changed = asyncio.run(world.certificates.revoke_all(owner, by=by, reason=""))
    assert changed == len(rows) == len(certificates)
    world.certificates.check(caller(neighbour))
    with pytest.raises(NotFoundError, match="site 'nobody' has no certificate"):
        asyncio.run(world.certificates.revoke_all(Owner("site", "nobody"), by=by, reason=""))


def test_a_site_revoked_by_its_name_does_not_come_back_by_a_certificate_that_had_ended_before(world):
    old = world.issue()
    world.now = old.not_valid_after_utc + timedelta(days=1)
    by = caller(world.issue(OPERATOR))
    rows, changed = asyncio.run(
        world.certificates.revoke_all(Owner("site", "clinic-a"), by=by, reason="lost")
    )
    assert ([row.serial for row in rows], changed) == ([serial_text(old)], 1)
    with pytest.raises(IdentityError, match="was revoked"):
        world.renew_ended(old)


def test_nobody_locks_themselves_out_and_the_coordinator_is_not_revoked(world):
    mine = world.issue(OPERATOR)
    with pytest.raises(ConflictError, match="lock you out"):
        world.revoke(mine, by=caller(mine))
    coordinator = world.issue(Subject("lab", "coordinator", ""))
    with pytest.raises(ConflictError, match="coordinator's own certificate can't be revoked"):
        world.revoke(coordinator)
    assert set(world.states().values()) == {"valid"}, "what is refused changes nothing"


def test_one_certificate_is_found_by_a_unique_beginning(world):
    serials = [serial_text(world.issue()) for _ in range(40)]
    shared = next(s[:1] for s in serials if sum(other[:1] == s[:1] for other in serials) > 1)
    with pytest.raises(ConflictError, match="serial numbers begin with"):
        world.certificates.one(shared)
    assert world.certificates.one(serials[0].upper()).serial == serials[0]
    for unknown in ("", "zz", "%"):
        with pytest.raises(NotFoundError):
            world.certificates.one(unknown)


def test_an_ended_certificate_is_renewed_for_thirty_days_by_its_key(world):
    old = world.issue()
    world.now = old.not_valid_after_utc + timedelta(days=29)
    site, chain = world.renew_ended(old)
    assert site == "clinic-a"
    world.certificates.check(caller(chain[0]))
    assert chain[0].not_valid_after_utc > world.now
    world.now = old.not_valid_after_utc + timedelta(days=30, seconds=1)
    with pytest.raises(IdentityError, match="more than 30 days ago"):
        world.renew_ended(old)


def test_an_ended_certificate_is_not_renewed_for_another_key_a_revoked_one_or_an_operator(world, tmp_path):
    old = world.issue()
    world.now = old.not_valid_after_utc + timedelta(days=1)
    with pytest.raises(IdentityError, match="not signed by the key"):
        world.renew_ended(old, key=new_key())
    operator = world.issue(OPERATOR)
    with pytest.raises(IdentityError, match="expected a site"):
        world.renew_ended(operator)
    foreign = create_authority(tmp_path / "other", "lab", NOW).issue(SITE, world.key.public_key(), NOW)[0]
    with pytest.raises(IdentityError, match="not in this coordinator's registry"):
        world.renew_ended(foreign)
    world.revoke(old)
    with pytest.raises(IdentityError, match="was revoked"):
        world.renew_ended(old)


def test_a_forged_certificate_with_a_known_serial_number_is_not_renewed(world, tmp_path):
    """Serial numbers are no secret: the signature of a trusted CA is what counts."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    old = world.issue(key=new_key())
    forger = create_authority(tmp_path / "other", "lab", NOW)
    builder = x509.CertificateBuilder().subject_name(old.subject).issuer_name(old.issuer)
    builder = builder.serial_number(old.serial_number).public_key(world.key.public_key())
    builder = builder.not_valid_before(old.not_valid_before_utc).not_valid_after(old.not_valid_after_utc)
    for extension in old.extensions:  # the authority's key identifier too
        builder = builder.add_extension(extension.value, extension.critical)
    forged = builder.sign(forger.issuing.key, hashes.SHA256())
    assert issuer_key_id(forged) == issuer_key_id(old)
    with pytest.raises(
        IdentityError, match="signed by CA \\(unnamed\\), which this federation no longer trusts"
    ):
        world.renew_ended(forged)


def test_the_database_of_the_first_version_is_migrated_and_its_certificates_count(tmp_path):
    """Certificates recorded before this table knew issuers: their rows stay valid."""
    authority = create_authority(tmp_path / "pki", "lab", NOW)
    certificate = authority.issue(SITE, new_key().public_key(), NOW)[0]
    with closing(sqlite3.connect(tmp_path / "db")) as old:
        old.executescript(MIGRATIONS[0] + "PRAGMA user_version=1;")
        old.execute(
            "INSERT INTO certificates (serial, role, subject_id, not_before, not_after, issued_at)"
            " VALUES (?, 'site', 'clinic-a', '2026-02-28T23:50:00.000000Z', '2026-03-31T00:00:00.000000Z', 'x')",
            (serial_text(certificate),),
        )
        old.commit()
    database = open_database(tmp_path / "db", MIGRATIONS)
    try:
        certificates = Certificates(database, lambda: authority, lambda: NOW)
        certificates.check(caller(certificate))
        (row,) = certificates.rows()
        assert (row.issuer, row.renews, row.state(NOW)) == ("", "", "valid")
    finally:
        database.close()
