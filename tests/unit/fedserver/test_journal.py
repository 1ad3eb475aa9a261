"""The journal: what was written is read back in order; what can't be read is named."""

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from fedcore.database import Database, open_database
from fedcore.errors import StorageError
from fedcore.plan import validate_plan
from fedserver import round_events as ev
from fedserver.journal import Journal, replay
from fedserver.round_state import Status
from fedserver.schema import MIGRATIONS

PLAN = validate_plan({"name": "t", "rounds": 1, "model": {"name": "cnn", "classes": 3, "input": [1, 8, 8]}})
STARTED = ev.RunStarted(at=1.0, sites=("a", "b"), synthesises=False)
INITIALISED = ev.RunInitialised(
    at=2.0, model="m", update_tensors=(("w", "F32", (2, 3)), ("n", "I64", ())), local_tensors=("bn",),
    objective="cross_entropy", objective_options_json="{}",
)  # fmt: skip
REPORT = ev.Report(num_examples=5, train_loss=0.1 + 0.2, seconds=1e-9)
EVERY_EVENT: list[ev.Event] = [
    STARTED,
    INITIALISED,
    ev.RoundOpened(
        at=3,
        round=1,
        attempt=1,
        expected=("a", "b"),
        registered=("a",),
        reason="ü",
        absent={"b": "not connected"},
    ),
    ev.TaskStarted(at=4, round=1, site="a"),
    ev.UpdateStored(at=5, round=1, site="a", digest="d", payload_bytes=2**40, report=REPORT),
    ev.SiteLetGo(at=6, round=1, site="b", reason="r"),
    ev.CollectionClosed(at=7, round=1, reason="r"),
    ev.AggregationFinished(at=8, round=1, model="m2", accepted=("a",), rejected={"b": "why"}),
    ev.AggregationFailed(at=8, round=1, reason="r", rejected={}),
    ev.StatisticsStored(at=8, round=1, site="a", digest="d", num_examples=5),
    ev.StatisticsLetGo(at=8, round=1, site="b", reason="r"),
    ev.StatisticsLost(at=8, round=1, lost={"a": "ü"}),
    ev.ModelRecalibrated(at=8, round=1, model="m3", rejected={"b": "ü"}),
    ev.RecalibrationSkipped(at=8, round=1, reason="ü"),
    ev.SynthesisFinished(at=9, round=1, impressions=None, made=0, note="n"),
    ev.EvaluationReported(
        at=10,
        round=1,
        site="a",
        metrics=(ev.Metrics(split="test", num_examples=2, num_correct=1, loss_sum=0.7),),
    ),
    ev.UpdatesScored(at=10, round=1, class_totals=(3, 0), before=(2, 0), after={"a": (1, 0)}, note="ü"),
    ev.EvaluationLetGo(at=10, round=1, site="a", reason="r"),
    ev.RoundFinished(at=11, round=1, record_json="{}"),
    ev.PauseRequested(at=12, by="ann"),
    ev.ResumeRequested(at=12, by="ann"),
    ev.ImpressionsPurged(at=12, purge="p", rounds=(1,), digests=("i",), sites=("a",), by="ann", reason="r"),
    ev.PurgeConfirmed(at=12, purge="p", site="a", deleted=("i",), audit_head="7:ab"),
    ev.ModelsDropped(at=12, rounds=(1, 2), reason="ü"),
    ev.RunFinished(at=13, status="ABORTED", reason="r"),
]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_database(tmp_path / "db", MIGRATIONS, create=True)
    yield opened
    opened.close()


def submit(journal: Journal, run: str, request_id: str | None = None) -> str:
    return asyncio.run(journal.submit(run, PLAN, request_id=request_id, submitted_by="ann")).run


def test_every_kind_of_event_is_read_back_as_it_was(database: Database) -> None:
    journal = Journal(database)
    submit(journal, "r1")
    asyncio.run(journal.append([("r1", event) for event in EVERY_EVENT]))
    assert journal.events("r1") == EVERY_EVENT
    kinds = {event.kind for event in EVERY_EVENT}
    assert kinds == set(ev.EVENT.json_schema()["discriminator"]["mapping"])


def test_runs_keep_apart_and_survive_a_restart(tmp_path: Path, database: Database) -> None:
    journal = Journal(database)
    submit(journal, "r1")
    submit(journal, "r2")
    asyncio.run(journal.append([("r2", STARTED), ("r1", STARTED), ("r2", INITIALISED)]))
    database.close()
    reopened = open_database(tmp_path / "db", MIGRATIONS)
    try:
        (one, first), (two, second) = Journal(reopened).replay()
    finally:
        reopened.close()
    assert (one.run, two.run, one.plan, one.submitted_by) == ("r1", "r2", PLAN, "ann")
    assert (first.status, second.status, first.model, second.model) == (
        Status.RUNNING,
        Status.WAITING,
        None,
        "m",
    )
    assert second == replay("r2", PLAN, [STARTED, INITIALISED])


def test_the_same_request_is_the_same_run(database: Database) -> None:
    journal = Journal(database)
    assert submit(journal, "r1", "q") == "r1"
    assert submit(journal, "r2", "q") == "r1"
    assert submit(journal, "r3") == "r3"
    assert submit(journal, "r4") == "r4"
    assert [s.run for s in journal.submissions()] == ["r1", "r3", "r4"]


def test_events_of_one_call_are_written_together_or_not_at_all(database: Database) -> None:
    journal = Journal(database)
    submit(journal, "r1")
    with pytest.raises(StorageError):
        asyncio.run(journal.append([("r1", STARTED), ("no such run", INITIALISED)]))
    assert journal.events("r1") == []


def spoil(path: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(statement, values)


@pytest.mark.parametrize(
    "body",
    ["", "{", "null", '{"kind": "nonsense", "at": 1}', '{"kind": "run_started", "at": 1}',
     '{"kind": "run_started", "at": null, "sites": [], "synthesises": false}',
     '{"kind": "run_started", "at": 1, "sites": [], "synthesises": false, "extra": 1}'],
)  # fmt: skip
def test_a_torn_or_garbled_record_is_named(tmp_path: Path, database: Database, body: str) -> None:
    journal = Journal(database)
    submit(journal, "r1")
    asyncio.run(journal.append([("r1", STARTED), ("r1", INITIALISED)]))
    spoil(tmp_path / "db", "UPDATE journal SET body = ? WHERE seq = 2", body)
    with pytest.raises(StorageError, match="journal record 2 of run r1 can't be read") as caught:
        journal.replay()
    assert "restore" in caught.value.hint


def test_a_garbled_plan_is_named(tmp_path: Path, database: Database) -> None:
    journal = Journal(database)
    submit(journal, "r1")
    spoil(tmp_path / "db", "UPDATE runs SET plan_json = '{}'")
    with pytest.raises(StorageError, match="journal: run r1: key 'name' is missing"):
        journal.replay()
