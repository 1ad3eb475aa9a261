"""A site follows its coordinator from term to term, never back, and its log says what a restore did."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedagent.audit import COORDINATOR, SiteAudit, coordinators_restores, open_site_audit
from fedagent.schema import MIGRATIONS
from fedcore.audit import Head, verify
from fedcore.audit_heads import head_to_proto
from fedcore.database import open_database
from fedcore.errors import TermError
from fedcore.term import FIRST_TERM, NO_TERM, Term, term_from_proto, term_to_proto
from fedcore.v1 import federation_pb2

SECOND, SECOND_LATER, THIRD = Term(2, 1_000), Term(2, 2_000), Term(3, 500)


class Site:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.database = open_site_audit(path)
        self.audit = SiteAudit(self.database)

    def meet(self, term: Term, records: int) -> None:
        """A hello with a coordinator of a term, whose log has so many records."""
        hello = federation_pb2.HelloRequest()
        self.audit.introduce(hello)
        head = Head(records, f"{records:064x}") if records else Head()
        reply = federation_pb2.HelloReply(
            federation="lab", term=term_to_proto(term), audit_head=head_to_proto(head)
        )
        asyncio.run(self.audit.greeted(hello, reply))

    @property
    def known(self) -> Term:
        hello = federation_pb2.HelloRequest()
        self.audit.introduce(hello)
        return term_from_proto(hello.newest_term, "site")

    def actions(self) -> list[str]:
        return [entry.document["action"] for entry in self.audit.log.walk()]

    @property
    def went_back(self) -> list[str]:
        return [peer.went_back for peer in self.audit.log.peers() if peer.went_back]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "audit.db")
    yield made
    made.database.close()


def test_the_newest_term_counts_and_outlasts_a_restart(site: Site) -> None:
    assert site.known == NO_TERM
    for term in (FIRST_TERM, SECOND, SECOND_LATER, THIRD):
        site.meet(term, 5)
        assert site.known == term
    site.database.close()
    again = Site(site.path)
    assert again.known == THIRD
    again.database.close()


@pytest.mark.parametrize("older", [NO_TERM, FIRST_TERM, SECOND])
def test_a_coordinator_come_back_from_the_dead_is_refused(site: Site, older: Term) -> None:
    site.meet(SECOND_LATER, 5)
    before = site.actions()
    for _ in range(3):
        with pytest.raises(TermError, match="it is the one that was replaced") as caught:
            site.meet(older, 99)
        assert "stop the old one" in caught.value.hint
        asyncio.run(site.audit.refused(caught.value))
    assert site.known == SECOND_LATER
    assert site.audit.log.kept_of(COORDINATOR).sequence == 5, "its head is not kept"
    assert site.actions() == [*before, "coordinator.refuse"], "once, however often it is met"


def test_a_log_that_went_back_with_a_restore_is_recorded_as_that(site: Site) -> None:
    site.meet(FIRST_TERM, 40)
    site.meet(SECOND, 12)
    site.meet(SECOND, 13)
    assert site.went_back == []
    record = next(e.document for e in site.audit.log.walk() if e.document["action"] == "coordinator.restored")
    assert record["detail"]["before"].startswith("40:")
    assert record["detail"]["after"].startswith("12:")
    assert record["detail"]["term"] == str(SECOND)
    assert verify(site.audit.log.walk()).finding is None
    (restored,) = coordinators_restores(site.path)
    assert "its log had 40 records before and 12 then" in str(restored)


def test_a_log_that_goes_back_within_its_term_is_tampering_as_ever(site: Site) -> None:
    site.meet(FIRST_TERM, 40)
    site.meet(FIRST_TERM, 12)
    assert len(site.went_back) == 1


def test_the_first_term_excuses_nothing(site: Site) -> None:
    """What a site kept before its coordinator had terms is held against it."""
    site.meet(NO_TERM, 40)
    site.meet(FIRST_TERM, 12)
    assert len(site.went_back) == 1


def test_an_audit_file_of_the_version_before_is_brought_forward(tmp_path: Path) -> None:
    path = tmp_path / "audit.db"
    open_database(path, MIGRATIONS[:1], create=True).close()
    site = Site(path)
    site.meet(FIRST_TERM, 3)
    assert site.known == FIRST_TERM
    site.database.close()
