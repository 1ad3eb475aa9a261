"""Counters go by what is journalled, and the journal says how long it took."""

import asyncio
from pathlib import Path

from fedcore.database import open_database
from fedcore.metrics_page import new_registry
from fedcore.plan import validate_plan
from fedcore.update_verdict import UpdateVerdict
from fedserver import round_events as ev
from fedserver.journal import Journal
from fedserver.run_meter import RunMeter
from fedserver.schema import MIGRATIONS

PLAN = validate_plan({"name": "t", "rounds": 1, "model": {"name": "cnn", "classes": 3, "input": [1, 8, 8]}})
REPORT = ev.Report(num_examples=5)


def test_facts_are_counted_once_they_are_durable(tmp_path: Path) -> None:
    meter = RunMeter(new_registry())
    meter.know(["a", "b"])

    def value(name: str, **labels: str) -> float | None:
        return meter.registry.get_sample_value(f"fedimpres_{name}", labels)

    facts: list[ev.Event] = [
        ev.UpdateStored(at=1, round=1, site="a", digest="d", payload_bytes=70, report=REPORT),
        ev.SiteLetGo(at=1, round=1, site="b", reason="r"),
        ev.AggregationFinished(at=1, round=1, model="m", accepted=("a",), rejected={"b": "why"}),
        ev.AggregationFinished(
            at=1,
            round=2,
            model="m",
            accepted=("a", "b"),
            rejected={},
            verdicts={
                "a": UpdateVerdict(passed=True, kept={"parameters": 0.5}),
                "b": UpdateVerdict(passed=True),
            },
        ),
        ev.SynthesisFinished(at=1, round=1, impressions="i", made=6, figures={"rejected": 2}),
        ev.RoundFinished(at=1, round=1, record_json="{}"),
        ev.RunFinished(at=1, status="DEGRADED", reason="r"),
    ]
    assert value("updates_total", site="b", verdict="rejected") == 0
    assert value("runs_finished_total", state="FAILED") == 0
    database = open_database(tmp_path / "t.db", MIGRATIONS, create=True)
    try:
        journal = Journal(database, meter.recorded)
        asyncio.run(journal.submit("r", PLAN, request_id=None, submitted_by="ann"))
        asyncio.run(journal.append([("r", fact) for fact in facts]))
    finally:
        database.close()
    assert value("received_bytes_total") == 70
    assert value("sites_let_go_total", site="b") == 1
    assert value("updates_total", site="a", verdict="accepted") == 1
    assert value("updates_total", site="a", verdict="shortened") == 1
    assert value("updates_total", site="b", verdict="accepted") == 1
    assert value("updates_total", site="b", verdict="rejected") == 1
    assert value("impressions_total", outcome="made") == 6
    assert value("impressions_total", outcome="rejected") == 2
    assert value("rounds_finished_total") == 1
    assert value("runs_finished_total", state="DEGRADED") == 1
    assert value("journal_commit_seconds_count") == 1
