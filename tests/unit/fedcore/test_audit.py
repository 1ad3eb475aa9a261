"""The audit chain: every way to tamper with a log is found, and the record named."""

import asyncio
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.audit import GENESIS, Entry, Fact, Head, Known, digest_of, parse_head, seal, verify
from fedcore.audit_store import AUDIT_SCHEMA, AuditLog
from fedcore.database import Database, open_database
from fedcore.errors import StorageError

TIME = "2026-01-01T00:00:00.000000Z"


def chain(length: int) -> list[Entry]:
    entries, head = [], Head()
    for number in range(length):
        entries.append(seal(head, TIME, Fact("run.submit", "operator/admin", object=f"run-{number}")))
        head = Head(entries[-1].position, entries[-1].digest)
    return entries


def head_of(entries: list[Entry]) -> Head:
    return Head(len(entries), entries[-1].digest)


def rewritten(entry: Entry, old: str, new: str) -> Entry:
    """The entry with another content and a digest that fits it."""
    body = entry.body.replace(old, new)
    assert body != entry.body
    return Entry(entry.position, body, digest_of(body))


def test_a_record_is_canonical_json_that_names_the_one_before():
    first, second = chain(2)
    assert first.body == (
        '{"action":"run.submit","actor":"operator/admin","detail":{},"object":"run-0","peer":"",'
        f'"previous":"{GENESIS}","result":"ok","role":"","sequence":1,"time":"{TIME}"}}'
    )
    assert second.document["previous"] == first.digest == digest_of(first.body)


def test_a_whole_log_is_found_whole():
    entries = chain(5)
    assert verify([]).head == Head(0, GENESIS)
    verdict = verify(entries, [Known("site-a", head_of(entries[:3])), Known("site-b", head_of(entries))])
    assert (verdict.records, verdict.head, verdict.finding) == (5, head_of(entries), None)


@given(st.integers(1, 12), st.data())
def test_an_edited_record_is_named(length, data):
    entries = chain(length)
    at = data.draw(st.integers(0, length - 1))
    entries[at] = replace(entries[at], body=entries[at].body.replace("admin", "other"))
    finding = verify(entries).finding
    assert finding is not None
    assert (finding.sequence, finding.kind) == (at + 1, "edited")


@given(st.integers(2, 12), st.data())
def test_an_edited_record_with_a_new_digest_is_named(length, data):
    entries = chain(length)
    at = data.draw(st.integers(0, length - 2))
    entries[at] = rewritten(entries[at], "admin", "other")
    finding = verify(entries).finding
    assert finding is not None
    assert (finding.sequence, finding.kind) == (at + 1, "edited")


@given(st.integers(2, 12), st.data())
def test_a_removed_record_is_named(length, data):
    entries = chain(length)
    at = data.draw(st.integers(0, length - 2))
    del entries[at]
    finding = verify(entries).finding
    assert finding is not None
    assert (finding.sequence, finding.kind) == (at + 1, "removed")


@given(st.integers(2, 12), st.data())
def test_moved_records_are_named(length, data):
    entries = chain(length)
    one, other = sorted(data.draw(st.lists(st.integers(0, length - 1), min_size=2, max_size=2, unique=True)))
    entries[one], entries[other] = entries[other], entries[one]
    finding = verify(entries).finding
    assert finding is not None
    assert (finding.sequence, finding.kind) == (one + 1, "reordered")


def test_a_copied_record_is_named():
    entries = chain(4)
    finding = verify([*entries[:3], entries[1], entries[3]]).finding
    assert finding is not None
    assert (finding.sequence, finding.kind) == (2, "reordered")


@given(st.integers(1, 12), st.data())
def test_a_cut_tail_is_found_by_a_head_that_somebody_kept(length, data):
    entries = chain(length)
    left = data.draw(st.integers(0, length - 1))
    assert verify(entries[:left]).finding is None
    finding = verify(entries[:left], [Known("clinic-a", head_of(entries))]).finding
    assert finding is not None
    assert (finding.sequence, finding.kind) == (left + 1, "cut")
    assert f"clinic-a has seen record {length}" in finding.text


def test_a_log_written_anew_from_its_start_is_found_by_a_kept_head():
    entries, kept = chain(4), Known("clinic-a", head_of(chain(3)))
    head, forged = Head(), []
    for entry in entries:
        forged.append(seal(head, TIME, Fact("run.submit", "operator/other", object=entry.document["object"])))
        head = Head(forged[-1].position, forged[-1].digest)
    assert verify(forged).finding is None
    finding = verify(forged, [kept]).finding
    assert finding is not None
    assert (finding.sequence, finding.kind) == (3, "edited")


def test_what_is_not_a_record_is_named_even_with_a_digest_that_fits():
    entries = chain(3)
    for body in ("nonsense", "[1]", '{"sequence":2}', "NaN"):
        broken = [entries[0], Entry(2, body, digest_of(body)), entries[2]]
        finding = verify(broken).finding
        assert finding is not None
        assert (finding.sequence, finding.kind) == (2, "edited")


@given(st.text(), st.text(), st.dictionaries(st.text(), st.text() | st.integers() | st.booleans()))
def test_any_text_gives_a_record_that_verifies_and_is_short(actor, thing, detail):
    entry = seal(Head(), TIME, Fact("a.b", actor, object=thing, detail=detail))
    assert verify([entry]).finding is None
    assert len(entry.document["actor"]) <= 300
    assert entry.body.isascii()


def test_heads_are_read_back_from_text():
    head = head_of(chain(3))
    assert parse_head(f" {head}\n") == head
    for bad in ("", "3", "3:xyz", f"-1:{head.digest}", f"3:{head.digest.upper()}"):
        with pytest.raises(ValueError, match="is not SEQUENCE:DIGEST"):
            parse_head(bad)


# -- the store ---------------------------------------------------------------------------------------


@pytest.fixture
def database(tmp_path: Path):
    database = open_database(tmp_path / "audit.db", [AUDIT_SCHEMA], create=True)
    yield database
    database.close()


def fill(log: AuditLog, count: int) -> None:
    for number in range(count):
        log.record_now(Fact("run.submit", "operator/admin", object=f"run-{number}"))


def tamper(database: Database, *statements: str) -> None:
    """What somebody who holds the file can do: another connection, triggers dropped."""
    with closing(sqlite3.connect(database.path)) as connection:
        for statement in (
            "DROP TRIGGER audit_is_append_only_1",
            "DROP TRIGGER audit_is_append_only_2",
            *statements,
        ):
            connection.execute(statement)
        connection.commit()


def check(log: AuditLog):
    return verify(log.walk(), log.known()).finding


def test_concurrent_writers_make_one_chain(database):
    log = AuditLog(database)

    async def all_at_once() -> list[Head]:
        return await asyncio.gather(*(log.record(Fact("x.y", object=str(n))) for n in range(600)))

    heads = asyncio.run(all_at_once())
    assert sorted(head.sequence for head in heads) == list(range(1, 601))
    assert check(log) is None
    assert log.head() == max(heads, key=lambda head: head.sequence)


def test_a_fact_is_recorded_exactly_if_its_transaction_is(database):
    log = AuditLog(database)

    def fails(connection: sqlite3.Connection) -> None:
        log.append(connection, Fact("x.y"))
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        database.write_now(fails)
    assert log.head() == Head()


def test_the_database_itself_refuses_changes(database):
    log = AuditLog(database)
    fill(log, 2)
    for statement in ("UPDATE audit SET body = ''", "DELETE FROM audit"):
        with pytest.raises(StorageError, match="append-only"):
            database.write_now(lambda c, statement=statement: c.execute(statement))
    assert check(log) is None


@pytest.mark.parametrize(
    ("statements", "sequence", "kind"),
    [
        (["UPDATE audit SET body = replace(body, 'admin', 'other') WHERE position = 3"], 3, "edited"),
        (["DELETE FROM audit WHERE position = 4"], 4, "removed"),
        (
            [
                "UPDATE audit SET position = -1 WHERE position = 2",
                "UPDATE audit SET position = 2 WHERE position = 5",
                "UPDATE audit SET position = 5 WHERE position = -1",
            ],
            2,
            "reordered",
        ),
        (["DELETE FROM audit WHERE position > 4"], 5, "cut"),
    ],
)
def test_tampering_with_the_file_is_found(database, statements, sequence, kind):
    log = AuditLog(database)
    fill(log, 6)
    database.write_now(lambda c: log.exchange(c, "site/a", theirs=Head(), ours=log.head()))
    assert check(log) is None
    tamper(database, *statements)
    finding = check(log)
    assert finding is not None
    assert (finding.sequence, finding.kind) == (sequence, kind)


def test_two_sides_that_say_hello_find_each_other_s_lost_records(database, tmp_path):
    """Records are cut off and the log goes on: the other side's kept head tells, for good."""
    ours, site = AuditLog(database), open_database(tmp_path / "site.db", [AUDIT_SCHEMA], create=True)
    theirs = AuditLog(site)

    def hello() -> tuple[list[str], list[str]]:
        said, kept = theirs.head(), theirs.kept_of("coordinator")
        answer, kept_of_site = ours.head(), ours.kept_of("site/a")
        ours_found = database.write_now(lambda c: ours.exchange(c, "site/a", theirs=said, ours=kept))
        theirs_found = site.write_now(
            lambda c: theirs.exchange(c, "coordinator", theirs=answer, ours=kept_of_site)
        )
        return ours_found, theirs_found

    try:
        fill(ours, 5)
        fill(theirs, 7)
        assert hello() == ([], [])
        fill(ours, 1)
        assert hello() == ([], [])
        tamper(site, "DELETE FROM audit WHERE position > 4")
        fill(theirs, 2)
        (ours_found,), (theirs_found,) = hello()
        assert "the log of site/a had record 7" in ours_found
        assert "coordinator has seen record 7 of this log" in theirs_found
        fill(theirs, 9)
        hello()
        finding = check(theirs)
        assert finding is not None
        assert finding.kind == "edited"
        assert "the log of site/a had record 7" in ours.peers()[0].went_back
        assert check(ours) is None
    finally:
        site.close()
