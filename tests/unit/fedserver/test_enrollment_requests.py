"""The table of sites that ask to be let in: bounded, fair to addresses, decided once; on a real database."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from fedcore.database import open_database
from fedcore.errors import ConfigError, ConflictError, IdentityError, NotFoundError, OverloadedError
from fedcore.identity import subject_of
from fedcore.pki import certificates_from_pem, key_fingerprint, make_request, new_key, verify_chain
from fedserver.authority import create_authority
from fedserver.config import LimitsConfig
from fedserver.enrollment_requests import EnrollmentRequests
from fedserver.registry import Registry
from fedserver.schema import MIGRATIONS

NOW = datetime(2026, 3, 1, tzinfo=UTC)
LIMITS = LimitsConfig(
    enroll_requests=6, enroll_requests_per_address=3, enroll_requests_per_site=2, enroll_request_hours=24
)


class World:
    def __init__(self, folder):
        self.now = NOW
        self.database = open_database(folder / "db", MIGRATIONS, create=True)
        self.authority = create_authority(folder / "pki", "lab", NOW)
        self.requests = EnrollmentRequests(self.database, lambda: self.authority, LIMITS, lambda: self.now)
        self.made = 0

    def file(self, address="10.0.0.1", site=None, key=None):
        """File a request, a moment after the last one; gives the key's fingerprint."""
        self.now += timedelta(seconds=1)
        self.made += 1
        key = key or new_key()
        site = site or f"site-{self.made}"
        asyncio.run(self.requests.file(site, make_request(key, site).decode(), address))
        return key_fingerprint(key.public_key())

    def waiting(self):
        return {row.key_fingerprint for row in self.requests.rows(state="waiting")}

    def approve(self, fingerprint):
        return asyncio.run(self.requests.approve(fingerprint, "ann"))

    def deny(self, fingerprint, reason=""):
        return asyncio.run(self.requests.deny(fingerprint, "ann", reason))


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path)
    yield made
    made.database.close()


def test_an_approved_request_gets_a_certificate_of_its_key_and_enrols_the_site(world):
    key = new_key()
    asked = world.file(site="clinic-a", key=key)
    assert Registry(world.database).sites() == []
    row = world.approve(asked)
    chain = certificates_from_pem(row.chain_pem.encode(), "chain")
    verify_chain(chain, world.authority.root, "site")
    assert key_fingerprint(chain[0].public_key()) == asked
    assert (subject_of(chain[0]).role, subject_of(chain[0]).id) == ("site", "clinic-a")
    assert [site.id for site in Registry(world.database).sites()] == ["clinic-a"]
    assert (row.state, row.decided_by) == ("approved", "ann")
    assert world.approve(asked).serial == row.serial, "again: the same certificate"
    with pytest.raises(ConflictError, match="was approved at"):
        world.deny(asked)


def test_a_denied_request_stays_denied_and_says_why(world):
    asked = world.file()
    assert world.deny(asked, "not ours").reason == "not ours"
    assert world.requests.one(asked).state == "denied"
    with pytest.raises(ConflictError, match="was denied at"):
        world.approve(asked)
    assert Registry(world.database).sites() == []


def test_asking_again_with_the_same_key_changes_nothing(world):
    key = new_key()
    asked = world.file(site="clinic-a", key=key)
    before = world.requests.one(asked)
    world.file(address="10.9.9.9", site="clinic-a", key=key)
    assert world.requests.one(asked) == before
    with pytest.raises(ConflictError, match="asked to be let in as clinic-a, not as clinic-b"):
        world.file(site="clinic-b", key=key)


def test_requests_expire_and_leave_no_row_behind(world):
    asked = world.file()
    world.now += timedelta(hours=25)
    assert world.requests.rows() == []
    for refused in (world.requests.one, world.approve):
        with pytest.raises(NotFoundError):
            refused(asked)
    world.file()
    count = "SELECT count(*) FROM enrollment_requests"
    assert world.database.read(lambda c: c.execute(count).fetchone()[0]) == 1


def test_an_approval_is_kept_no_longer_than_its_certificate_lives(world):
    world.authority = create_authority_of(world, timedelta(hours=2))
    asked = world.file()
    world.approve(asked)
    world.now += timedelta(hours=1)
    assert world.requests.one(asked).state == "approved"
    world.now += timedelta(hours=1)
    with pytest.raises(NotFoundError):
        world.requests.one(asked)


def create_authority_of(world, lifetime):
    from dataclasses import replace

    return replace(world.authority, lifetimes={"site": lifetime})


def test_one_address_or_one_name_takes_its_share_and_no_more(world):
    for _ in range(3):
        world.file("10.0.0.1")
    with pytest.raises(OverloadedError, match=r"wait already from address 10\.0\.0\.1"):
        world.file("10.0.0.1")
    world.file("10.0.0.2", site="popular")
    world.file("10.0.0.3", site="popular")
    with pytest.raises(OverloadedError, match="as popular wait already"):
        world.file("10.0.0.4", site="popular")
    assert len(world.waiting()) == 5
    world.deny(next(iter(world.waiting())))
    world.file("10.0.0.4")  # others are let in all the while


def test_a_full_table_makes_room_at_the_cost_of_who_has_most(world):
    greedy = [world.file("10.0.0.1") for _ in range(3)]
    other = [world.file("10.0.0.2") for _ in range(3)]
    first = world.file("10.0.0.3")
    assert world.waiting() == {*greedy[:2], *other, first}, "the newest of the one with most is gone"
    second = world.file("10.0.0.4")
    assert world.waiting() == {*greedy[:2], *other[:2], first, second}
    third = world.file("10.0.0.5")
    fourth = world.file("10.0.0.6")
    everybody = {greedy[0], other[0], first, second, third, fourth}
    assert world.waiting() == everybody, "one for each address"
    with pytest.raises(
        OverloadedError, match="6 requests to be let in wait already, the limit of this coord"
    ):
        world.file("10.0.0.7")
    with pytest.raises(OverloadedError):
        world.file("10.0.0.1")
    assert world.waiting() == everybody


def test_what_can_not_be_signed_is_not_filed(world):
    with pytest.raises(ConfigError, match="is not a site name"):
        world.file(site="Clinic A")
    with pytest.raises(IdentityError, match="certificate request can't be read"):
        asyncio.run(world.requests.file("clinic-a", "rubbish", "10.0.0.1"))
    assert world.requests.rows() == []
