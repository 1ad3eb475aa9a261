"""Who is connected: the newest connection of a site is the one that counts."""

import asyncio

import pytest

from fedcore.clock import ManualClock
from fedcore.errors import IdentityError, OverloadedError
from fedcore.v1 import federation_pb2
from fedserver.roster import Roster, Session
from fedserver.round_decisions import Withheld

ABLE = federation_pb2.Capabilities(device="cpu", num_examples=7)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(100.0)


@pytest.fixture
def roster(clock: ManualClock) -> Roster:
    return Roster(clock, max_agents=2)


def connect(roster: Roster, site: str) -> Session:
    return roster.open(site, roster.greet(site, ABLE))


def drain(session: Session) -> list[federation_pb2.Directive | None]:
    return [session.outbox.get_nowait() for _ in range(session.outbox.qsize())]


def test_a_newer_stream_replaces_the_older_and_its_end_changes_nothing(
    roster: Roster, clock: ManualClock
) -> None:
    older = connect(roster, "a")
    clock.advance(5)
    newer = connect(roster, "a")
    assert drain(older) == [None]
    assert roster.sessions == {"a": newer}
    roster.close(older)
    assert roster.sessions == {"a": newer}
    presence = roster.presence({}, {})["a"]
    assert (presence.connected, presence.since, presence.last_progress) == (True, 105.0, 105.0)
    clock.advance(1)
    roster.close(newer)
    presence = roster.presence({}, {})["a"]
    assert (presence.connected, presence.since) == (False, 106.0)
    assert roster.sessions == {}


def test_a_stream_needs_the_newest_hello_of_its_own_site(roster: Roster) -> None:
    stale = roster.greet("a", ABLE)
    session = roster.greet("a", ABLE)
    for site, wrong in (("a", stale), ("a", ""), ("a", "0" * 16), ("b", session)):
        with pytest.raises(IdentityError, match=f"{site}: no hello for session"):
            roster.open(site, wrong)
    session = roster.greet("a", ABLE)
    roster.open("a", session)
    with pytest.raises(IdentityError):
        roster.open("a", session)


def test_admission_is_bounded_but_a_reconnect_always_fits(roster: Roster) -> None:
    connect(roster, "a")
    connect(roster, "b")
    with pytest.raises(OverloadedError, match="2 agents are connected, the limit of this coordinator"):
        roster.greet("c", ABLE)
    roster.close(connect(roster, "a"))
    connect(roster, "c")


def test_progress_and_ability(roster: Roster, clock: ManualClock) -> None:
    connect(roster, "a")
    clock.advance(3)
    roster.progressed("a")
    roster.progressed("nobody")
    presence = roster.presence({"a": "its data can't be read"}, {})["a"]
    assert (presence.last_progress, presence.since, presence.unable) == (
        103.0,
        100.0,
        "its data can't be read",
    )
    assert roster.last_seen("a") > "2020"
    assert roster.last_seen("b") == ""


def test_a_slow_reader_gets_no_more_directives_but_still_its_end(roster: Roster) -> None:
    session = connect(roster, "a")
    ping = federation_pb2.Directive(ping=federation_pb2.Ping(nonce=1))
    sent = 0
    while session.send(ping):
        sent += 1
    assert sent == session.outbox.maxsize
    session.end()
    got = drain(session)
    assert got[-1] is None
    assert len(got) == sent


def test_the_end_of_a_session_wakes_its_reader(roster: Roster) -> None:
    async def story() -> None:
        session = connect(roster, "a")
        waiting = asyncio.create_task(session.outbox.get())
        await asyncio.sleep(0)
        connect(roster, "a")
        assert await asyncio.wait_for(waiting, 1) is None

    asyncio.run(story())


def test_sites_that_operators_withhold_are_told_wherever_they_are(roster: Roster) -> None:
    connect(roster, "a")
    why = Withheld("disabled by operator ann", at_once=True)
    presence = roster.presence({}, {"a": why, "never-seen": why})
    assert [(p.connected, p.withheld, p.able) for p in presence.values()] == [
        (True, why, False), (False, why, False),
    ]  # fmt: skip
    assert roster.presence({}, {})["a"].able
