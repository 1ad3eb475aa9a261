"""Which models go: never the best, the last or what a run needs, and oldest runs that are over first."""

from dataclasses import replace
from types import MappingProxyType

import pytest

from fedcore.errors import ConflictError, NotFoundError, PlanError
from fedcore.plan import Plan, validate_plan
from fedcore.round_record import RoundRecord
from fedserver import round_events as ev
from fedserver.finished_round import FinishedRound
from fedserver.model_drops import (
    ToDrop,
    apply_drop,
    droppable,
    dropped_only,
    fixed_bytes,
    given_up,
    has_model,
    raise_if_dropped,
    to_free,
)
from fedserver.round_machine import apply
from fedserver.round_state import Drop, RunState, Stage, Status, Straggler, needed, superseded

GIB = 1 << 30


def make_plan(**changes: object) -> Plan:
    model = {"name": "cnn", "classes": 2, "input": [1, 8, 8]}
    return validate_plan({"name": "t", "rounds": 9, "model": model, **changes})


def make_run(
    name: str, models: str, *, best: int = 1, over: bool = True, plan: Plan | None = None, **changes: object
) -> RunState:
    """A run whose rounds left these models, a letter each; the `best` of them by validation."""
    records = tuple(
        FinishedRound.of(RoundRecord(
            round=n, expected=1, registered=1, started=1, reported=1, aggregated=1, accuracy=None,
            balanced_accuracy=None, validation_accuracy=0.9 if n == best else 0.5, model=model,
        ).model_dump_json())
        for n, model in enumerate(models, start=1)
    )  # fmt: skip
    state = RunState(
        name, plan or make_plan(), Status.DONE if over else Status.RUNNING, Stage.OVER if over else Stage.OPENING,
        finished=len(models), records=records, model=models[-1:] or None, released=models[-1:] or None,
    )  # fmt: skip
    return replace(state, **changes)  # type: ignore[arg-type]


def drop(*rounds: int) -> ev.ModelsDropped:
    return ev.ModelsDropped(at=0.0, rounds=rounds, reason="a quota")


def test_all_but_the_best_and_the_last_may_go_whether_or_not_the_run_is_over() -> None:
    for over in (True, False):
        state = make_run("a", "mnopq", best=2, over=over)
        before_last = {4: "p"} if over else {}
        assert droppable(state) == {1: "m", 3: "o", **before_last}, "a torn journal may look back one round"
        after = apply(state, drop(1, 3))
        assert superseded(state, after) == {"m", "o"}
        assert needed(after) == {"n", "p", "q"}
        assert droppable(after) == before_last
        assert [has_model(after, digest) for digest in "mn"] == [False, True]


def test_what_a_run_under_way_needs_stays() -> None:
    straggler = Straggler(round=2, attempt=1, model="m", impressions=None, strategy_state=None)
    state = make_run("a", "mnopq", best=5, over=False, stragglers={"c": straggler})
    assert droppable(state) == {2: "n", 3: "o"}, "a late site trains on m, and p is the last but one"
    assert droppable(replace(state, plan=make_plan(training={"initial": "n"}))) == {3: "o"}
    assert droppable(replace(state, status=Status.DONE, stragglers={})).keys() == {1, 2, 3, 4}


@pytest.mark.parametrize("rounds", [(), (2,), (5,), (6,), (1, 2), (0,)])
def test_a_drop_of_anything_else_is_refused_whole(rounds: tuple[int, ...]) -> None:
    with pytest.raises(ConflictError):
        apply(make_run("a", "mnopq", best=2), drop(*rounds))


def test_nothing_is_dropped_twice() -> None:
    state = apply_drop(make_run("a", "mnopq"), drop(2))
    with pytest.raises(ConflictError, match="rounds 2, expected some of 3-4"):
        apply(state, drop(2))


def test_equal_bytes_of_a_round_that_stays_stay() -> None:
    state = make_run("a", "mmnon", best=4)
    assert droppable(state) == {1: "m", 2: "m"}, "n is the last round's too"
    after = apply(state, drop(1))
    assert superseded(state, after) == set(), "round 2 has the same bytes"
    assert dropped_only([after]) == {}
    assert dropped_only([apply(after, drop(2))]) == {"m": 0.0}


def test_old_runs_that_are_over_come_first_and_in_each_its_oldest_rounds() -> None:
    states = [
        make_run("live", "abcd", over=False), make_run("old", "efgh", best=4), make_run("new", "ijkl", best=2),
    ]  # fmt: skip
    sizes = dict.fromkeys("abcdefghijkl", GIB)

    def gone(quota_gib: int) -> list[tuple[str, tuple[int, ...]]]:
        return [(found.run, found.rounds) for found in to_free(states, sizes, quota_gib * GIB, 99)]

    assert gone(12) == []
    assert gone(11) == [("old", (1,))]
    assert gone(8) == [("old", (1, 2, 3)), ("new", (1,))]
    everything = [("old", (1, 2, 3)), ("new", (1, 3)), ("live", (2,))]
    assert gone(6) == everything
    assert gone(1) == everything, "best and last stay, whatever the quota"
    assert fixed_bytes(states, sizes) == 6 * GIB
    assert "quota of 5 GiB" in to_free(states, sizes, 5 * GIB, 99)[0].reason
    assert [(f.run, f.rounds) for f in to_free(states, sizes, GIB, 2)] == [("old", (1, 2))], (
        "so many at a time"
    )


def test_bytes_that_two_runs_have_go_from_both_and_last() -> None:
    states = [make_run("a", "xyz", best=3), make_run("b", "xyw", best=3)]
    sizes = dict.fromkeys("xyzw", GIB)
    assert [(f.run, f.rounds) for f in to_free(states, sizes, 3 * GIB, 99)] == [("a", (1,)), ("b", (1,))]


def test_what_another_run_started_from_frees_nothing_and_stays() -> None:
    child = make_run("child", "", over=False, plan=make_plan(training={"initial": "m"}), records=())
    states = [make_run("parent", "mno", best=2), child]
    assert to_free(states, dict.fromkeys("mno", GIB), GIB, 99) == []
    assert fixed_bytes(states, dict.fromkeys("mno", GIB)) == 3 * GIB


def test_a_plan_keeps_so_many_of_the_newest_and_the_best() -> None:
    plan = make_plan(keep_models=2)
    found = given_up(make_run("a", "mnopq", best=2, over=False, plan=plan))
    assert found == ToDrop("a", (1, 3), "the plan keeps the newest 2 models and the best (keep_models = 2)")
    assert given_up(make_run("a", "mn", plan=plan)) is None
    assert given_up(make_run("a", "mnopq")) is None
    with pytest.raises(PlanError, match="keep_models"):
        make_plan(keep_models=0)
    assert "keep_models" not in make_plan(keep_models=2).to_site_json(), (
        "agents of version 0.1 know no such key"
    )


def test_whoever_asks_for_a_dropped_model_reads_when_why_and_what_is_there() -> None:
    dropped = MappingProxyType({1: Drop(0.0, "a quota"), 3: Drop(0.0, "a quota")})
    state = make_run("a", "mnopq", best=2, dropped=dropped)
    with pytest.raises(NotFoundError, match="round 3 was dropped at 1970-01-01T00:00:00") as caught:
        raise_if_dropped([state], "o")
    assert "a quota" in caught.value.message
    assert caught.value.hint == "rounds whose model is there: 2, 4-5"
    raise_if_dropped([state], "n")
