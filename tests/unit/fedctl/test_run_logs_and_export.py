"""What happened, followed through a lost connection; and the parts of an export that need no coordinator."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from fedcore.errors import ConfigError, ConflictError, UnreachableError
from fedcore.plan import parse_plan, plan_from_json
from fedcore.v1 import operations_pb2
from fedctl import following
from fedctl.run_export import _claim, plan_toml
from fedctl.run_logs import event_document, event_line, events_of, since_moment

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


def event(position: int, kind: str = "task_started") -> operations_pb2.RunEvent:
    return operations_pb2.RunEvent(
        position=position, kind=kind, at="2026-05-01T11:00:00+00:00", body_json="{}"
    )


class Streams:
    """An `Admin` whose streams bring what each list holds; an error at its end is raised."""

    who = "coordinator x"

    def __init__(self, *streams: list[Any]) -> None:
        self.streams = list(streams)
        self.asked: list[int] = []

    def stream(
        self, method: object, request: operations_pb2.WatchEventsRequest, timeout_s: float | None = None
    ) -> Iterator[operations_pb2.RunEvent]:
        self.asked.append(request.after)
        for one in self.streams.pop(0):
            if isinstance(one, Exception):
                raise one
            yield one


def test_events_are_followed_from_where_they_were_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "FIRST_PAUSE_S", 0.0)
    gone = UnreachableError("gone")
    submitted = event(0, "run_submitted")
    admin = Streams(
        [submitted, gone], [submitted, event(3), gone], [], [event(4), event(9, "run_finished"), event(10)]
    )
    found = [one.position for one in events_of(cast(Any, admin), "t-1", going_on=True)]
    assert found == [0, 3, 4, 9], "none twice, none left out, and the end is the end"
    assert admin.asked == [0, 0, 3, 3]


def test_an_event_as_a_line_and_as_an_object() -> None:
    told = operations_pb2.RunEvent(
        at="2026-05-01T11:00:00+00:00",
        kind="site_let_go",
        round=2,
        site="a",
        text="let go: late",
        body_json='{"x":1}',
    )
    assert event_line(told) == "2026-05-01T11:00:00+00:00  round 2 a: let go: late"
    assert event_line(event(1)).endswith("  run: ")
    assert event_document(told)["event"] == {"x": 1}
    assert event_document(event(1))["site"] is None


def test_since_is_a_duration_or_a_moment_that_is_past() -> None:
    assert since_moment("2h", NOW) == "2026-05-01T10:00:00+00:00"
    assert since_moment("2026-05-01T12:00:00+02:00", NOW) == "2026-05-01T12:00:00+02:00"
    assert datetime.fromisoformat(since_moment("2026-05-01", NOW)).tzinfo is not None
    with pytest.raises(ConfigError, match="yet to come"):
        since_moment("2026-05-02T00:00:00Z", NOW)
    with pytest.raises(ConfigError, match="not a duration"):
        since_moment("yesterday", NOW)


PLAN = """
name = "t"
rounds = 2
sites = ["a", "b"]
strategy = "fedimpres"
[strategy_options]
weighting = "uniform"
[model]
name = "noop"
classes = 2
input = [1, 8, 8]
options.params = 12
[data]
class_names = ["a \\"b\\"", "c"]
[evaluation]
data = "/x/y.npz"
"""


def test_an_exported_plan_is_the_plan_that_ran() -> None:
    plan = parse_plan(PLAN)
    text = plan_toml(json.loads(plan.to_json()))
    assert parse_plan(text) == plan == plan_from_json(plan.to_json())


def test_a_folder_is_claimed_for_one_run_and_never_taken_from_another_use(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    _claim(out, "t-1")
    assert json.loads((out / "export.json").read_text()) == {"run": "t-1", "complete": False}
    _claim(out, "t-1")
    spoil: dict[str, Callable[[], object]] = {
        "an export of run t-1": lambda: None,
        "is no manifest": lambda: (out / "export.json").write_text("[]"),
        "other files": lambda: ((out / "export.json").unlink(), (out / "mine.txt").write_text("")),
    }
    for message, change in spoil.items():
        change()
        with pytest.raises(ConflictError, match=message):
            _claim(out, "t-2")
