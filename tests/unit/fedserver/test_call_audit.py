"""Which calls become records, and that refusals can't fill the log."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedcore.audit_store import AUDIT_SCHEMA, AuditLog
from fedcore.database import open_database
from fedcore.errors import NotFoundError, PermissionDeniedError, StorageError
from fedserver.call_audit import CallAudit, RefusalThrottle, note


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Edge:
    def __init__(self, root: Path) -> None:
        self.database = open_database(root / "a.db", [AUDIT_SCHEMA], create=True)
        self.log = AuditLog(self.database)
        self.clock = Clock()
        self.audit = CallAudit(self.log, self.clock)

    def call(self, method: str, error: Exception | None = None, actor: str = "operator/ann") -> None:
        """One unary call through the edge."""

        async def story() -> None:
            record = self.audit.open(f"/fedcore.v1.{method}", "ipv4:10.0.0.1:5")
            record.actor, record.role = actor, "operator"
            note("run/blood-1", reason="it was wrong")
            if error is None:
                await self.audit.succeeded(record)
            else:
                await self.audit.failed(record, error)

        asyncio.run(story())

    def records(self) -> list[dict[str, Any]]:
        return [entry.document for entry in self.log.walk()]


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[Edge]:
    made = Edge(tmp_path)
    yield made
    made.database.close()


def test_a_call_that_changes_something_is_recorded_with_what_its_handler_knows(edge):
    edge.call("Admin/AbortRun")
    (record,) = edge.records()
    assert record.items() >= {
        "actor": "operator/ann", "role": "operator", "peer": "ipv4:10.0.0.1:5", "action": "run.abort",
        "object": "run/blood-1", "result": "ok", "detail": {"reason": "it was wrong"},
    }.items()  # fmt: skip


def test_reads_are_recorded_only_when_they_are_refused(edge):
    edge.call("Admin/GetRun")
    edge.call("Admin/GetRun", NotFoundError("no run"))
    assert edge.records() == []
    edge.call("Admin/GetRun", PermissionDeniedError("may not"))
    (record,) = edge.records()
    assert (record["action"], record["result"]) == ("run.show", "permission_denied")
    assert record["detail"]["error"] == "may not"


def test_failures_of_recorded_calls_say_the_code_and_keep_our_bugs_words_to_the_log(edge):
    edge.call("Admin/AbortRun", NotFoundError("no run 'x'"))
    edge.call("Admin/AbortRun", ValueError("password=1234"))
    first, second = edge.records()
    assert (first["result"], first["detail"]["error"]) == ("not_found", "no run 'x'")
    assert (second["result"], second["detail"]["error"]) == ("internal", "ValueError")


def test_a_method_outside_the_table_that_is_refused_is_recorded(edge):
    edge.call("Admin/Forgotten", PermissionDeniedError("may not"))
    assert [one["action"] for one in edge.records()] == ["rpc.unknown"]


def test_a_success_that_can_not_be_recorded_is_not_answered(edge):
    edge.database.close()
    with pytest.raises(StorageError):
        edge.call("Admin/AbortRun")
    edge.call("Admin/AbortRun", PermissionDeniedError("may not"))  # the refusal itself stands


def test_refusals_of_one_caller_are_counted_when_they_are_many(edge):
    denied = PermissionDeniedError("may not")
    for _ in range(50):
        edge.call("Admin/GetRun", denied)
    assert len(edge.records()) == 20
    edge.call("Admin/GetRun", denied, actor="operator/bob")
    edge.clock.now = 10.0
    edge.call("Admin/GetRun", denied)
    *_, bob, ann = edge.records()
    assert (bob["actor"], "refusals_not_recorded" in bob["detail"]) == ("operator/bob", False)
    assert ann["detail"]["refusals_not_recorded"] == 30
    edge.call("Admin/GetRun", denied)
    assert len(edge.records()) == 22


def test_callers_without_number_do_not_fill_memory():
    throttle = RefusalThrottle(Clock())
    for number in range(10_000):
        assert throttle.admit(f"site/{number}", "site.hello") == 0
    assert len(throttle._buckets) == 4096
