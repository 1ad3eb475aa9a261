"""The life of a run: hand-made scenarios, then Hypothesis driving it at random with its invariants checked throughout."""

import json
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedcore.errors import ConflictError
from fedcore.plan import Plan, plan_from_json, validate_plan
from fedcore.update_verdict import FoldedUpdate, MergeFigures, UpdateVerdict
from fedserver import round_events as ev
from fedserver.impression_purges import banks, in_use, purged_only
from fedserver.journal import replay
from fedserver.model_drops import droppable, dropped_only
from fedserver.recalibration import PoolStatistics, Recalibrate
from fedserver.round_decisions import Presence, Withheld, World, concerned, decide, waiting_for
from fedserver.round_machine import apply
from fedserver.round_state import RunState, Stage, Status, needed, superseded
from fedserver.round_work import (
    Aggregate,
    Command,
    Evaluate,
    Initialise,
    ScoreUpdates,
    SiteCommand,
    Synthesise,
    Train,
    task_of,
    work,
)

SITES = ("a", "b", "c")


def make_plan(**changes: object) -> Plan:
    document: dict[str, object] = {
        "name": "t",
        "rounds": 2,
        "min_sites": 2,
        "strategy": "fedavg",
        "model": {"name": "cnn", "classes": 3, "input": [1, 8, 8]},
        "limits": {"round_deadline_s": 100, "stall_timeout_s": 20, "join_wait_s": 5},
    }
    return validate_plan({**document, **changes})


def here(
    sites: str = "abc", *, since: float = 0.0, progress: float = 0.0, gone_since: float = 0.0
) -> dict[str, Presence]:
    return {s: Presence(s in sites, "", since if s in sites else gone_since, progress) for s in SITES}


def world(now: float = 0.0, sites: dict[str, Presence] | None = None, stage_since: float = 0.0) -> World:
    return World(
        now=now, wall=1000.0 + now, stage_since=stage_since, sites=here() if sites is None else sites
    )


class Story:
    """A run told event by event, with the decisions that follow."""

    def __init__(self, plan: Plan | None = None, synthesises: bool = False) -> None:
        self.state = RunState(run="t-1", plan=plan or make_plan())
        self.events: list[ev.Event] = []
        self.tell(ev.RunStarted(at=0, sites=SITES, synthesises=synthesises))
        self.tell(
            ev.RunInitialised(
                at=0, model="m0", update_tensors=(("w", "F32", (2,)),), local_tensors=(), objective="cross_entropy",
                objective_options_json="{}",
            )
        )  # fmt: skip

    def tell(self, event: ev.Event) -> None:
        self.state = apply(self.state, event)
        self.events.append(event)

    def follow(self, around: World) -> list[str]:
        kinds = []
        while events := decide(self.state, around):
            for event in events:
                self.tell(event)
                kinds.append(event.kind)
        return kinds

    def report(self, site: str, round_number: int = 1, digest: str | None = None) -> None:
        report = ev.Report(num_examples=10)
        self.tell(
            ev.UpdateStored(
                at=1, round=round_number, site=site, digest=digest or f"u-{site}-{round_number}", payload_bytes=8,
                report=report,
            )
        )  # fmt: skip

    def aggregate(self, sites: str, round_number: int = 1, rejected: dict[str, str] | None = None) -> None:
        self.tell(
            ev.AggregationFinished(
                at=2,
                round=round_number,
                model=f"m{round_number}",
                accepted=tuple(sites),
                rejected=rejected or {},
            )
        )

    def evaluate(self, sites: str, round_number: int = 1, validation: int = 5) -> None:
        for site in sites:
            metrics = (
                ev.Metrics(split="test", num_examples=10, num_correct=7, loss_sum=3.0),
                ev.Metrics(split="validation", num_examples=10, num_correct=validation, loss_sum=3.0),
            )
            self.tell(ev.EvaluationReported(at=3, round=round_number, site=site, metrics=metrics))

    def whole_round(self, number: int, sites: str = "abc", validation: int = 5) -> None:
        self.follow(world(100.0 * number, here(sites), 100.0 * number))
        for site in sites:
            self.report(site, number)
        self.follow(world(100.0 * number, here(sites), 100.0 * number))
        self.aggregate(sites, number)
        self.evaluate(sites, number, validation)
        self.follow(world(100.0 * number, here(sites), 100.0 * number))


def test_a_queued_run_has_no_work_and_decides_nothing() -> None:
    state = RunState(run="t", plan=make_plan())
    assert work(state) == ()
    assert decide(state, world(now=1e9)) == ()


def test_an_undisturbed_run_ends_done() -> None:
    story = Story()
    assert story.follow(world()) == ["round_opened"]
    assert [type(c) for c in work(story.state)] == [Train, Train, Train]
    for site in "abc":
        story.report(site)
    assert story.follow(world()) == ["collection_closed"]
    (command,) = work(story.state)
    assert isinstance(command, Aggregate)
    assert [site for site, _, _ in command.updates] == ["a", "b", "c"]
    story.aggregate("abc")
    assert {type(c) for c in work(story.state)} == {Evaluate}
    story.evaluate("abc")
    assert story.follow(world()) == ["round_finished", "round_opened"]
    record = story.state.records[0].record()
    assert (record.expected, record.registered, record.started, record.reported, record.aggregated) == (
        3,
        3,
        3,
        3,
        3,
    )
    assert record.accuracy == pytest.approx(0.7)
    assert record.missing == {}
    story.whole_round(2)
    assert story.state.status is Status.DONE
    assert work(story.state) == ()
    assert story.state.model == "m2"


def test_before_initialisation_the_only_work_is_to_initialise() -> None:
    state = apply(RunState(run="t", plan=make_plan()), ev.RunStarted(at=0, sites=SITES, synthesises=False))
    assert work(state) == (Initialise(),)


def test_the_round_waits_for_all_expected_sites_then_for_join_wait() -> None:
    story = Story()
    two = here("ab")
    assert story.follow(world(4.9, two)) == []
    assert "c (not connected)" in waiting_for(story.state, world(4.9, two))
    assert story.follow(world(5.1, two)) == ["round_opened"]
    assert story.state.current is not None
    assert story.state.current.registered == ("a", "b")
    assert story.state.current.expected == SITES


def test_a_site_long_gone_does_not_delay_every_round() -> None:
    story = Story()
    story.follow(world(6, here("ab")))
    story.report("a")
    story.report("b")
    story.follow(world(7, here("ab")))
    story.aggregate("ab")
    story.evaluate("ab")
    assert story.follow(world(8, here("ab"), stage_since=8)) == ["round_finished", "round_opened"]


def test_without_quorum_the_run_fails_after_the_deadline_and_says_who_was_missing() -> None:
    story = Story()
    one = here("a")
    assert story.follow(world(99, one)) == []
    assert story.follow(world(101, one)) == ["run_finished"]
    assert story.state.status is Status.FAILED
    assert "b (not connected)" in story.state.reason


def test_quorum_met_early_does_not_close_the_round() -> None:
    story = Story()
    story.follow(world())
    story.report("a")
    story.report("b")
    assert story.follow(world(19, here(progress=10.0))) == []
    assert story.state.stage is Stage.TRAINING


def test_a_stalled_site_is_let_go_and_the_run_ends_degraded_naming_it() -> None:
    story = Story()
    story.follow(world())
    story.report("a")
    story.report("b")
    assert story.follow(world(21)) == ["site_let_go", "collection_closed"]
    story.aggregate("ab")
    story.evaluate("ab")
    story.follow(world(22, here("abc"), 22))
    assert story.state.records[0].record().missing == {"c": "no progress for 21 s"}
    story.whole_round(2)
    assert story.state.status is Status.DEGRADED
    assert "c in round 1" in story.state.reason
    assert story.state.missed == {1: ("c",)}


def test_a_lost_connection_is_forgiven_within_the_stall_timeout() -> None:
    story = Story()
    story.follow(world())
    story.report("a")
    story.report("b")
    gone = here("ab", gone_since=10.0)
    assert story.follow(world(29, gone)) == []
    assert story.follow(world(31, gone)) == ["site_let_go", "collection_closed"]


def test_progress_keeps_a_slow_site_in_until_the_deadline() -> None:
    story = Story()
    story.follow(world())
    story.report("a")
    story.report("b")
    assert story.follow(world(99, here(progress=98.0))) == []
    assert story.follow(world(101, here(progress=100.0))) == ["site_let_go", "collection_closed"]
    assert "deadline" in story.state.current.let_go["c"]  # type: ignore[union-attr]


def test_below_quorum_the_round_is_repeated_once_keeping_what_is_there_then_the_run_fails() -> None:
    story = Story()
    story.follow(world())
    story.report("a")
    for site in "bc":
        story.tell(ev.SiteLetGo(at=1, round=1, site=site, reason="out of memory"))
    assert story.follow(world(1)) == ["collection_closed", "round_opened"]
    assert [c.site for c in work(story.state) if isinstance(c, Train)] == ["b", "c"]
    for site in "bc":
        story.tell(ev.SiteLetGo(at=1, round=1, site=site, reason="out of memory"))
    assert story.follow(world(2)) == ["collection_closed", "run_finished"]
    assert story.state.status is Status.FAILED
    assert "out of memory" in story.state.reason


def test_an_update_that_the_gate_refuses_is_asked_for_again_when_quorum_is_lost() -> None:
    story = Story(make_plan(min_sites=3))
    story.follow(world())
    for site in "abc":
        story.report(site)
    story.follow(world())
    story.aggregate("ab", rejected={"c": "norm"})
    assert story.follow(world(1)) == ["round_opened"]
    assert [c.site for c in work(story.state) if isinstance(c, Train)] == ["c"]


def test_the_gates_verdicts_are_in_the_record_those_of_a_failed_attempt_too() -> None:
    story = Story(make_plan(min_sites=3, rounds=1))
    around = world(sites={s: replace(p, num_examples=10) for s, p in here("abc").items()})
    story.follow(around)
    for site in "abc":
        story.report(site)
    story.follow(around)
    (command,) = work(story.state)
    assert isinstance(command, Aggregate)
    assert command.registered_examples == (("a", 10), ("b", 10), ("c", 10))
    passed = UpdateVerdict(passed=True, norm=1.0, median=1.0, limit=6.0, num_examples=10, registered=10)
    refused = passed.model_copy(update={"passed": False, "reason": "far", "norm": 9.0})
    story.tell(
        ev.AggregationFailed(
            at=2,
            round=1,
            reason="only 2",
            rejected={"c": "far"},
            verdicts={"a": passed, "b": passed, "c": refused},
        )
    )
    assert story.follow(around) == ["round_opened"]
    assert [c.site for c in work(story.state) if isinstance(c, Train)] == ["c"]
    story.report("c")
    story.follow(around)
    figures = MergeFigures(rule="mean", weights={"a": 0.5, "b": 0.5, "c": 0.0})
    story.tell(
        ev.AggregationFinished(
            at=2, round=1, model="m1", accepted=SITES, rejected={}, verdicts={"c": passed}, merge=figures
        )
    )
    story.evaluate("abc")
    story.follow(around)
    (record,) = (finished.record() for finished in story.state.records)
    assert record.gate == {"a": passed, "b": passed, "c": passed}
    assert record.merge == figures


def test_impressions_are_made_beside_the_evaluation_and_reach_the_next_round() -> None:
    plan = make_plan(strategy="fedimpres", synthesis={"warmup_rounds": 1, "images": 8})
    story = Story(plan, synthesises=True)
    story.follow(world())
    for site in "abc":
        story.report(site)
    story.follow(world())
    story.aggregate("abc")
    assert any(isinstance(c, Synthesise) for c in work(story.state))
    story.evaluate("abc")
    assert story.follow(world()) == []
    story.tell(ev.SynthesisFinished(at=4, round=1, impressions="i1", made=8))
    assert story.follow(world()) == ["round_finished", "round_opened"]
    assert story.state.records[0].record().impressions.made == 8
    assert all(c.impressions == "i1" for c in work(story.state) if isinstance(c, Train))


def test_impressions_are_made_beside_training_through_the_model_it_starts_from() -> None:
    plan = make_plan(rounds=9, strategy="fedimpres", synthesis={"warmup_rounds": 1, "images": 8})
    story = Story(plan, synthesises=True)
    story.state = replace(story.state, overlaps=True)

    def synthesis() -> list[Synthesise]:
        return [c for c in work(story.state) if isinstance(c, Synthesise)]

    def rest_of_round(number: int) -> None:
        for site in "abc":
            story.report(site, number)
        story.follow(world())
        story.aggregate("abc", round_number=number)
        story.evaluate("abc", number)
        story.follow(world())

    story.follow(world())
    assert synthesis() == []  # there is no model yet that a round has made
    rest_of_round(1)
    assert story.state.stage is Stage.TRAINING
    first = story.state.released
    assert synthesis() == [Synthesise(2, first, None, None)]
    # The sites may well be faster: the round then waits for the impressions.
    rest_of_round(2)
    assert story.state.finished == 1
    assert synthesis() == [Synthesise(2, first, None, None)]
    story.tell(ev.SynthesisFinished(at=4, round=2, impressions="i1", made=8))
    assert story.follow(world()) == ["round_finished", "round_opened"]
    assert story.state.records[1].impressions_digest == "i1"
    assert all(c.impressions == "i1" for c in work(story.state) if isinstance(c, Train))
    assert synthesis() == [Synthesise(3, story.state.released, "i1", first)]


def test_impressions_made_beside_an_attempt_that_failed_serve_its_repetition() -> None:
    plan = make_plan(rounds=9, strategy="fedimpres", synthesis={"warmup_rounds": 1, "images": 8})
    story = Story(plan, synthesises=True)
    story.state = replace(story.state, overlaps=True, finished=1, model="m1", released="m1")
    story.follow(world())
    story.tell(ev.SynthesisFinished(at=4, round=2, impressions="i1", made=8))
    for site in "abc":
        story.tell(ev.SiteLetGo(at=4, round=2, site=site, reason="lost"))
    assert "round_opened" in story.follow(world())
    assert story.state.attempts == 2
    assert not any(isinstance(c, Synthesise) for c in work(story.state))
    assert story.state.current is not None
    assert story.state.current.new_impressions == "i1"


def test_failed_synthesis_costs_the_impressions_and_not_the_round() -> None:
    plan = make_plan(strategy="fedimpres", synthesis={"warmup_rounds": 1, "images": 8})
    story = Story(plan, synthesises=True)
    story.follow(world())
    for site in "abc":
        story.report(site)
    story.follow(world())
    story.aggregate("abc")
    story.evaluate("abc")
    story.tell(ev.SynthesisFinished(at=4, round=1, impressions=None, made=0, note="loss is NaN"))
    assert story.follow(world()) == ["round_finished", "round_opened"]
    assert story.state.records[0].record().impressions.note == "loss is NaN"


def test_pause_takes_effect_after_the_round_and_resume_goes_on() -> None:
    story = Story()
    story.follow(world())
    story.tell(ev.PauseRequested(at=1, by="olga"))
    with pytest.raises(ConflictError):
        apply(story.state, ev.PauseRequested(at=1, by="olga"))
    for site in "abc":
        story.report(site)
    story.follow(world())
    story.aggregate("abc")
    story.evaluate("abc")
    assert story.follow(world()) == ["round_finished"]
    assert story.state.status is Status.PAUSED
    assert work(story.state) == ()
    story.tell(ev.ResumeRequested(at=9, by="olga"))
    assert story.follow(world()) == ["round_opened"]


def test_while_rounds_are_held_the_one_under_way_goes_on_and_none_is_opened() -> None:
    story = Story()
    story.follow(world())
    held = replace(world(), held="draining: no round is opened")
    for site in "abc":
        story.report(site)
    assert story.follow(held) == ["collection_closed"]
    story.aggregate("abc")
    story.evaluate("abc")
    assert story.follow(held) == ["round_finished"]
    assert work(story.state) == ()
    late = replace(held, now=1e6, sites=here(""))
    assert story.follow(late) == [], "nor does the run fail for sites that nobody waits for"
    assert waiting_for(story.state, late) == "draining: no round is opened"
    assert story.follow(world()) == ["round_opened"]


def test_a_pause_asked_for_before_the_first_round_keeps_it_from_opening() -> None:
    state = apply(RunState(run="t", plan=make_plan()), ev.RunStarted(at=0, sites=SITES, synthesises=False))
    state = apply(state, ev.PauseRequested(at=1, by="olga"))
    initialised = ev.RunInitialised(
        at=2, model="m0", update_tensors=(), local_tensors=(), objective="o", objective_options_json="{}"
    )
    state = apply(state, initialised)
    assert state.status is Status.PAUSED
    assert decide(state, world()) == ()


def test_abort_ends_all_work_and_nothing_can_happen_afterwards() -> None:
    story = Story()
    story.follow(world())
    story.tell(ev.RunFinished(at=1, status="ABORTED", reason="aborted by olga"))
    assert work(story.state) == ()
    with pytest.raises(ConflictError, match="is over"):
        story.report("a")


@pytest.mark.parametrize(
    "event",
    [
        ev.UpdateStored(
            at=1, round=2, site="a", digest="x", payload_bytes=1, report=ev.Report(num_examples=1)
        ),
        ev.UpdateStored(
            at=1, round=1, site="z", digest="x", payload_bytes=1, report=ev.Report(num_examples=1)
        ),
        ev.AggregationFinished(at=1, round=1, model="m", accepted=("a",), rejected={}),
        ev.EvaluationReported(at=1, round=1, site="a", metrics=()),
        ev.RoundFinished(at=1, round=1, record_json="{}"),
        ev.ResumeRequested(at=1, by="olga"),
    ],
)
def test_what_cannot_happen_is_refused(event: ev.Event) -> None:
    story = Story()
    story.follow(world())
    with pytest.raises(ConflictError):
        apply(story.state, event)


def test_a_start_is_acknowledged_once_and_only_by_sites_at_work() -> None:
    story = Story()
    story.follow(world())
    story.tell(ev.TaskStarted(at=1, round=1, site="a"))
    with pytest.raises(ConflictError):
        apply(story.state, ev.TaskStarted(at=1, round=1, site="a"))
    story.tell(ev.SiteLetGo(at=1, round=1, site="b", reason="x"))
    with pytest.raises(ConflictError):
        apply(story.state, ev.TaskStarted(at=1, round=1, site="b"))


DISABLED = Withheld("disabled by operator ann: MRI upgrade", at_once=True)
DRAINING = Withheld("draining by operator ann", at_once=False)


def with_withheld(why: Withheld, *, connected: bool = True) -> dict[str, Presence]:
    return {**here("ab"), "c": Presence(connected, "", 0.0, 0.0, why)}


def test_a_disabled_site_is_let_go_at_once_and_named() -> None:
    story = Story()
    story.follow(world())
    story.report("a")
    # Just disabled, its stream ended: no stall timeout is waited for.
    assert story.follow(world(1.0, with_withheld(DISABLED, connected=False))) == ["site_let_go"]
    assert story.state.current is not None
    assert dict(story.state.current.let_go) == {"c": DISABLED.reason}
    story.report("b")
    story.follow(world(1.0, with_withheld(DISABLED)))
    story.aggregate("ab")
    story.evaluate("ab")
    # The next round opens without waiting for it, for it will not come.
    assert story.follow(world(1.0, with_withheld(DISABLED, connected=False), 1.0)) == [
        "round_finished", "round_opened",
    ]  # fmt: skip
    assert story.state.records[0].record().missing == {"c": DISABLED.reason}
    assert dict(story.state.current.absent) == {"c": DISABLED.reason}


def test_a_disabled_sites_figures_are_not_waited_for() -> None:
    story = Story()
    story.follow(world())
    for site in "abc":
        story.report(site)
    story.follow(world())
    story.aggregate("abc")
    assert story.follow(world(1.0, with_withheld(DISABLED, connected=False))) == ["evaluation_let_go"]


def test_a_draining_site_finishes_its_round_and_is_not_asked_for_the_next() -> None:
    story = Story()
    story.follow(world())
    assert story.follow(world(1.0, with_withheld(DRAINING))) == []
    for site in "abc":
        story.report(site)
    story.follow(world(1.0, with_withheld(DRAINING)))
    story.aggregate("abc")
    story.evaluate("abc")
    assert story.follow(world(1.0, with_withheld(DRAINING), 1.0)) == ["round_finished", "round_opened"]
    assert story.state.records[0].record().missing == {}
    assert story.state.current is not None
    assert story.state.current.registered == ("a", "b")
    assert dict(story.state.current.absent) == {"c": DRAINING.reason}


def test_a_withheld_site_that_is_needed_is_waited_for_by_name() -> None:
    story = Story(make_plan(min_sites=3))
    around = world(1.0, with_withheld(DRAINING))
    assert story.follow(around) == []
    assert DRAINING.reason in waiting_for(story.state, around)
    assert story.follow(world(1.5)) == ["round_opened"], "an operator let it in again"


def test_a_site_that_comes_and_goes_without_end_does_not_keep_the_round_from_opening() -> None:
    story = Story()
    flapping = {**here("ab"), "c": Presence(True, "its data can't be read", 100.5, 0.0)}
    assert [event.kind for event in decide(story.state, world(101, flapping))] == ["round_opened"]


def test_an_update_counts_once() -> None:
    story = Story()
    story.follow(world())
    story.report("a")
    with pytest.raises(ConflictError):
        story.report("a", digest="another")


def test_early_stop_looks_at_validation_and_keeps_the_best_round() -> None:
    story = Story(make_plan(rounds=9, training={"early_stop": 2}))
    story.whole_round(1, validation=5)
    story.whole_round(2, validation=8)
    story.whole_round(3, validation=7)
    story.whole_round(4, validation=8)
    assert story.state.status is Status.DONE
    assert story.state.finished == 4
    assert story.state.best is not None
    assert story.state.best.round == 2
    assert "stopped early" in story.state.reason


def test_sites_per_round_draws_the_same_sites_every_time() -> None:
    story = Story(make_plan(training={"sites_per_round": 2}))
    story.follow(world())
    assert story.state.current is not None
    first = story.state.current.expected
    assert len(first) == 2
    again = Story(make_plan(training={"sites_per_round": 2}))
    again.follow(world())
    assert again.state.current is not None
    assert again.state.current.expected == first


def test_what_is_released_is_evaluated_and_what_is_trained_goes_on() -> None:
    story = Story()
    story.follow(world())
    assert {c.strategy_state for c in work(story.state) if isinstance(c, Train)} == {None}
    for site in "abc":
        story.report(site)
    story.follow(world())
    story.tell(
        ev.AggregationFinished(
            at=2, round=1, model="m1", released="r1", strategy_state="s1", accepted=SITES, rejected={}
        )
    )
    assert {c.model for c in work(story.state) if isinstance(c, Evaluate)} == {"r1"}
    story.evaluate("abc")
    story.follow(world())
    assert story.state.records[0].model == "r1"
    assert {c.model for c in work(story.state) if isinstance(c, Train)} == {"m1"}
    for site in "abc":
        story.report(site, 2)
    story.follow(world())
    (command,) = work(story.state)
    assert isinstance(command, Aggregate)
    assert (command.model, command.released, command.strategy_state) == ("m1", "r1", "s1")
    # A round whose strategy writes nothing keeps what there was.
    story.tell(ev.AggregationFinished(at=2, round=2, model="m2", released="r2", accepted=SITES, rejected={}))
    assert story.state.current is not None
    assert story.state.current.strategy_state == "s1"


@pytest.mark.parametrize("shares", [True, False])
def test_sites_get_the_state_that_the_strategy_shares(shares: bool) -> None:
    state = RunState(run="t", plan=make_plan())
    events: list[ev.Event] = [
        ev.RunStarted(at=0, sites=SITES, synthesises=False),
        ev.RunInitialised(
            at=0, model="m0", update_tensors=(), local_tensors=(), objective="o", objective_options_json="{}",
            shares_state=shares,
        ),
    ]  # fmt: skip
    for event in events:
        state = apply(state, event)
    state = replace(state, strategy_state="s1")
    for event in decide(state, world()):
        state = apply(state, event)
    assert {c.strategy_state for c in work(state) if isinstance(c, Train)} == {"s1" if shares else None}


def test_impressions_that_serve_the_whole_run_are_made_once() -> None:
    state = RunState(run="t", plan=make_plan(synthesis={"warmup_rounds": 0}))
    story = Story.__new__(Story)
    story.state, story.events = state, []
    story.tell(ev.RunStarted(at=0, sites=SITES, synthesises=True))
    story.tell(
        ev.RunInitialised(
            at=0, model="m0", update_tensors=(), local_tensors=(), objective="o", objective_options_json="{}",
            synthesises_once=True,
        )
    )  # fmt: skip
    for number, made in ((1, True), (2, False)):
        story.follow(world())
        for site in "abc":
            story.report(site, number)
        story.follow(world())
        story.aggregate("abc", number)
        assert any(isinstance(c, Synthesise) for c in work(story.state)) is made
        if made:
            story.tell(ev.SynthesisFinished(at=3, round=1, impressions="i1", made=4, figures={"fresh": 4}))
        story.evaluate("abc", number)
        story.follow(world())
    assert story.state.status is Status.DONE
    assert story.state.impressions == "i1"
    assert story.state.records[0].record().impressions.figures == {"fresh": 4}


def test_events_of_an_older_journal_are_read() -> None:
    old = (
        '{"kind":"aggregation_finished","at":2,"round":1,"model":"m1","accepted":["a","b","c"],"rejected":{}}'
    )
    story = Story()
    story.follow(world())
    for site in "abc":
        story.report(site)
    story.follow(world())
    story.tell(ev.EVENT.validate_json(old))
    story.evaluate("abc")
    story.follow(world())
    assert story.state.model == story.state.released == story.state.records[0].model == "m1"
    assert story.state.strategy_state is None
    initialised = ev.EVENT.validate_json(
        '{"kind":"run_initialised","at":1,"model":"m","update_tensors":[],"local_tensors":[],"objective":"o",'
        '"objective_options_json":"{}"}'
    )
    assert isinstance(initialised, ev.RunInitialised)
    assert not initialised.shares_state


SCORED_PLAN = {"evaluation": {"updates_data": "/own.npz"}}


def test_updates_that_passed_the_gate_are_scored_beside_the_evaluation() -> None:
    story = Story(make_plan(**SCORED_PLAN))
    story.follow(world())
    for site in "abc":
        story.report(site)
    story.follow(world())
    assert [type(command) for command in work(story.state)] == [Aggregate], (
        "nothing is scored before the merge"
    )
    story.aggregate("ac", rejected={"b": "NaN"})
    (command,) = [c for c in work(story.state) if isinstance(c, ScoreUpdates)]
    assert command == ScoreUpdates(1, "m0", (("a", "u-a-1"), ("c", "u-c-1")))
    assert {"u-a-1", "u-c-1"} <= needed(story.state)
    story.evaluate("ac")
    assert story.follow(world()) == [], "the record waits for the scores"
    scored = ev.UpdatesScored(at=9, round=1, class_totals=(2, 2, 0), before=(2, 1, 0), after={"a": (0, 2, 0)})
    story.tell(scored)
    assert story.follow(world()) == ["round_finished", "round_opened"]
    scores = story.state.records[0].record().update_scores
    assert scores is not None
    assert scores.forgetting == {"a": 0.5}
    assert story.state.records[0].record().phases_s["evaluating"] == 7.0
    with pytest.raises(ConflictError, match="not under way"):
        story.tell(scored)


def test_scoring_that_failed_costs_the_scores_and_not_the_round() -> None:
    story = Story(make_plan(rounds=1, **SCORED_PLAN))
    story.follow(world())
    for site in "abc":
        story.report(site)
    story.follow(world())
    story.aggregate("abc")
    story.tell(ev.UpdatesScored(at=3, round=1, note="updates not scored: own.npz is gone"))
    assert not [c for c in work(story.state) if isinstance(c, ScoreUpdates)], "it is not tried without end"
    with pytest.raises(ConflictError, match="can't happen"):
        story.tell(ev.UpdatesScored(at=3, round=1))
    story.evaluate("abc")
    story.follow(world())
    assert story.state.status is Status.DONE
    scores = story.state.records[0].record().update_scores
    assert scores is not None
    assert (scores.note, scores.mean_forgetting) == ("updates not scored: own.npz is gone", None)


def test_a_plan_without_images_asks_for_no_scores_and_takes_none() -> None:
    story = Story()
    story.whole_round(1)
    assert story.state.records[0].record().update_scores is None
    for site in "abc":
        story.report(site, 2)
    story.follow(world(100.0, stage_since=100.0))
    story.aggregate("abc", 2)
    with pytest.raises(ConflictError, match="can't happen"):
        story.tell(ev.UpdatesScored(at=3, round=2))


def test_a_journal_from_before_updates_were_scored_is_replayed() -> None:
    story = Story(make_plan(rounds=1))
    story.whole_round(1)
    lines = [ev.EVENT.dump_json(event) for event in story.events]
    record = json.loads(json.loads(lines[-2])["record_json"])
    del record["update_scores"], record["gate"], record["merge"], record["folded"]
    lines[-2] = json.dumps({**json.loads(lines[-2]), "record_json": json.dumps(record)}).encode()
    plan = json.loads(story.state.plan.to_json())
    del plan["evaluation"]
    again = replay("t-1", plan_from_json(json.dumps(plan)), [ev.EVENT.validate_json(line) for line in lines])
    assert again == story.state


def test_what_a_finished_round_leaves_behind_can_go() -> None:
    story = Story()
    story.follow(world())
    before = story.state
    for site in "abc":
        story.report(site)
    assert superseded(before, story.state) == set()
    story.follow(world())
    aggregated = ev.AggregationFinished(
        at=2, round=1, model="m1", released="r1", strategy_state="s1", accepted=SITES, rejected={}
    )
    story.tell(aggregated)
    before = story.state
    story.evaluate("abc")
    story.follow(world())
    # The first model may be the operator's: it stays.
    assert superseded(before, story.state) == {"u-a-1", "u-b-1", "u-c-1"}
    assert needed(story.state) == {"m1", "r1", "s1"}
    for site in "abc":
        story.report(site, 2)
    story.follow(world())
    later = {"round": 2, "model": "m2", "released": "r2", "strategy_state": "s2"}
    story.tell(aggregated.model_copy(update=later))
    before = story.state
    story.evaluate("abc", 2)
    story.follow(world())
    assert story.state.status is Status.DONE
    assert superseded(before, story.state) == {"u-a-2", "u-b-2", "u-c-2", "m1", "m2", "s1", "s2"}
    assert needed(story.state) == {"r1", "r2"}


class RunMachine(RuleBasedStateMachine):
    """Random facts at random times. Facts that the state does not allow must be refused without a trace."""

    def __init__(self) -> None:
        super().__init__()
        plan = make_plan(
            rounds=3, strategy="fedimpres", synthesis={"warmup_rounds": 1, "images": 4}, **SCORED_PLAN
        )
        self.plan = plan
        self.state = RunState(run="t", plan=plan)
        self.events: list[ev.Event] = []
        self.now = 0.0
        self.stage_since = 0.0
        self.presence = here("")
        self.counted: dict[int, set[str]] = {}
        # Models whose files the driver has deleted.
        self.deleted: set[str] = set()

    def try_event(self, event: ev.Event) -> bool:
        before = self.state
        try:
            after = apply(before, event)
        except ConflictError:
            assert self.state is before
            return False
        if after.stage is not before.stage:
            self.stage_since = self.now
        self.check_concerned(before, event, after)
        self.deleted |= {digest for digest in superseded(before, after) if digest[0] in "mr"}
        self.state = after
        self.events.append(event)
        return True

    def check_concerned(self, before: RunState, event: ev.Event, after: RunState) -> None:
        """Who is not concerned by a fact is asked what it was asked before, and nothing follows but with time."""
        sites = concerned(after, [event])
        if sites is None:
            return
        others = [{c for c in work(s) if getattr(c, "site", "") not in sites} for s in (before, after)]
        assert others[0] == others[1]
        everybody = here(since=self.now, progress=self.now)
        assert decide(after, World(self.now, self.now, self.now, everybody)) == ()

    def settle(self) -> None:
        for _ in range(50):
            events = decide(self.state, World(self.now, self.now, self.stage_since, self.presence))
            if not events:
                return
            for event in events:
                assert self.try_event(event), f"decided {event.kind}, which the state refuses"
        raise AssertionError("decisions never settle")

    @rule()
    def start(self) -> None:
        self.try_event(ev.RunStarted(at=self.now, sites=SITES, synthesises=True))
        self.settle()

    @rule(overlaps=st.booleans(), recalibrates=st.booleans())
    def initialise(self, overlaps: bool, recalibrates: bool) -> None:
        self.try_event(
            ev.RunInitialised(
                at=self.now,
                model="m0",
                update_tensors=(),
                local_tensors=(),
                objective="o",
                objective_options_json="{}",
                overlaps=overlaps,
                statistic_tensors=(("bn.running_mean", "F32", (2,)),) if recalibrates else (),
            )
        )
        self.settle()

    @rule(site=st.sampled_from(SITES), connected=st.booleans())
    def connection(self, site: str, connected: bool) -> None:
        self.presence = {**self.presence, site: Presence(connected, "", self.now, self.now)}
        self.settle()

    @rule(seconds=st.floats(0, 150))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.settle()

    @rule(site=st.sampled_from(SITES), digest=st.integers(0, 3))
    def update(self, site: str, digest: int) -> None:
        number = self.state.current.number if self.state.current else 1
        stored = self.try_event(
            ev.UpdateStored(
                at=self.now, round=number, site=site, digest=f"{site}{digest}", payload_bytes=4,
                report=ev.Report(num_examples=3),
            )
        )  # fmt: skip
        if stored:
            self.counted.setdefault(number, set()).add(site)
        self.settle()

    @rule(site=st.sampled_from(SITES))
    def fail(self, site: str) -> None:
        number = self.state.current.number if self.state.current else 1
        self.try_event(ev.SiteLetGo(at=self.now, round=number, site=site, reason="x"))
        self.settle()

    @precondition(lambda self: any(isinstance(c, Aggregate) for c in work(self.state)))
    @rule(refused=st.sets(st.sampled_from(SITES)), averaged=st.booleans(), keeps=st.booleans())
    def aggregate(self, refused: set[str], averaged: bool, keeps: bool) -> None:
        (command,) = [c for c in work(self.state) if isinstance(c, Aggregate)]
        sites = [site for site, _, _ in command.updates]
        accepted = tuple(s for s in sites if s not in refused)
        rejected = {s: "no" for s in sites if s in refused}
        if accepted:
            event: ev.Event = ev.AggregationFinished(
                at=self.now, round=command.round, model=f"m{command.round}", accepted=accepted, rejected=rejected,
                released=f"r{command.round}" if averaged else None, strategy_state=f"s{command.round}" if keeps else None,
            )  # fmt: skip
        else:
            event = ev.AggregationFailed(at=self.now, round=command.round, reason="none", rejected=rejected)
        assert self.try_event(event)
        self.settle()

    @rule(site=st.sampled_from(SITES), works=st.booleans())
    def measure(self, site: str, works: bool) -> None:
        number = self.state.current.number if self.state.current else 1
        event: ev.Event = ev.StatisticsLetGo(at=self.now, round=number, site=site, reason="x")
        if works:
            digest = f"t{site}{number}"
            event = ev.StatisticsStored(at=self.now, round=number, site=site, digest=digest, num_examples=3)
        asked = any(isinstance(c, Recalibrate) and c.site == site for c in work(self.state))
        assert self.try_event(event) is asked
        self.settle()

    @precondition(lambda self: any(isinstance(c, PoolStatistics) for c in work(self.state)))
    @rule(works=st.booleans(), lost=st.sets(st.sampled_from(SITES), max_size=1))
    def pool(self, works: bool, lost: set[str]) -> None:
        (command,) = [c for c in work(self.state) if isinstance(c, PoolStatistics)]
        number = command.round
        event: ev.Event = ev.RecalibrationSkipped(at=self.now, round=number, reason="x")
        lost &= {site for site, _, _ in command.statistics}
        if lost:
            event = ev.StatisticsLost(at=self.now, round=number, lost=dict.fromkeys(lost, "damaged"))
        elif works:
            event = ev.ModelRecalibrated(at=self.now, round=number, model=f"mc{number}")
        assert self.try_event(event)
        self.settle()

    @precondition(lambda self: any(isinstance(c, Synthesise) for c in work(self.state)))
    @rule(works=st.booleans())
    def synthesise(self, works: bool) -> None:
        (command,) = [c for c in work(self.state) if isinstance(c, Synthesise)]
        number = command.round
        assert self.try_event(
            ev.SynthesisFinished(
                at=self.now, round=number, impressions=f"i{number}" if works else None, made=4 if works else 0,
                previous=command.previous,
            )
        )  # fmt: skip
        self.settle()

    @rule(chosen=st.sets(st.integers(1, 3), min_size=1))
    def purge(self, chosen: set[int]) -> None:
        found = {r: d for r, d in banks(self.state).items() if r in chosen}
        event = ev.ImpressionsPurged(
            at=self.now, purge=f"p{len(self.events)}", rounds=tuple(found), digests=tuple(found.values()),
            sites=self.state.sites, by="o", reason="r",
        )  # fmt: skip
        possible = bool(found) and not any(self.state.purge_of(number) for number in found)
        assert self.try_event(event) is possible
        self.settle()

    @rule(site=st.sampled_from(SITES))
    def confirm(self, site: str) -> None:
        for purge in self.state.purges:
            event = ev.PurgeConfirmed(
                at=self.now, purge=purge.id, site=site, deleted=purge.digests, audit_head="1:a"
            )
            assert self.try_event(event) is (site not in purge.confirmed)

    @rule(chosen=st.sets(st.integers(1, 3)))
    def drop(self, chosen: set[int]) -> None:
        possible = droppable(self.state)
        event = ev.ModelsDropped(at=self.now, rounds=tuple(sorted(chosen)), reason="quota")
        assert self.try_event(event) is (bool(chosen) and chosen <= possible.keys())
        self.settle()

    @rule(works=st.booleans())
    def score(self, works: bool) -> None:
        wanted = [c for c in work(self.state) if isinstance(c, ScoreUpdates)]
        number = self.state.current.number if self.state.current else 1
        found = {site: (1, 0, 1) for command in wanted for site, _ in command.updates}
        event = ev.UpdatesScored(at=self.now, round=number, note="no images")
        if works:
            event = ev.UpdatesScored(
                at=self.now, round=number, class_totals=(2, 0, 1), before=(2, 0, 1), after=found
            )
        assert self.try_event(event) is bool(wanted)
        self.settle()

    @rule(site=st.sampled_from(SITES), validated=st.integers(0, 4))
    def evaluation(self, site: str, validated: int) -> None:
        number = self.state.current.number if self.state.current else 1
        metrics = (
            ev.Metrics(split="test", num_examples=4, num_correct=2, loss_sum=1.0),
            ev.Metrics(split="validation", num_examples=4, num_correct=validated, loss_sum=1.0),
        )
        self.try_event(ev.EvaluationReported(at=self.now, round=number, site=site, metrics=metrics))
        self.settle()

    @rule(
        validated=st.lists(st.integers(0, 4), min_size=1, max_size=3),
        chances=st.tuples(st.booleans(), st.booleans(), st.booleans()),
        drops=st.lists(st.sets(st.integers(1, 3), max_size=2), min_size=1, max_size=5),
    )
    def rounds_go_well(
        self, validated: list[int], chances: tuple[bool, bool, bool], drops: list[set[int]]
    ) -> None:
        """What single steps seldom come to: rounds that finish, one after the other; and drops in the course of them."""
        overlaps, averaged, recalibrates = chances
        if self.state.status is Status.QUEUED:
            self.start()
        self.presence = here(since=self.now, progress=self.now)
        self.settle()
        for correct in validated:
            finished = self.state.finished
            for _ in range(8):  # stages
                for command in work(self.state):
                    if self.state.finished == finished and command in work(self.state):
                        self.do(command, correct, overlaps, averaged, recalibrates)
                        self.drop(chosen=drops[len(self.events) % len(drops)])
                        self.what_is_dropped_is_neither_the_best_nor_the_last_nor_needed()

    def do(
        self, command: Command, validated: int, overlaps: bool, averaged: bool, recalibrates: bool
    ) -> None:
        match command:
            case Initialise():
                self.initialise(overlaps=overlaps, recalibrates=recalibrates)
            case Train():
                self.update(site=command.site, digest=0)
            case Aggregate():
                self.aggregate(refused=set(), averaged=averaged, keeps=True)
            case Recalibrate():
                self.measure(site=command.site, works=True)
            case PoolStatistics():
                self.pool(works=True, lost=set())
            case Synthesise():
                self.synthesise(works=True)
            case Evaluate():
                self.evaluation(site=command.site, validated=validated)
            case ScoreUpdates():
                self.score(works=True)

    @rule()
    def pause(self) -> None:
        self.try_event(ev.PauseRequested(at=self.now, by="o"))
        self.settle()

    @rule()
    def resume(self) -> None:
        self.try_event(ev.ResumeRequested(at=self.now, by="o"))
        self.settle()

    @precondition(lambda self: len(self.events) > 12)
    @rule()
    def abort(self) -> None:
        self.try_event(ev.RunFinished(at=self.now, status="ABORTED", reason="o"))

    @invariant()
    def replay_equals_live(self) -> None:
        texts = [ev.EVENT.dump_json(event) for event in self.events]
        again = replay("t", self.plan, [ev.EVENT.validate_json(text) for text in texts])
        assert again == self.state

    @invariant()
    def the_round_is_consistent(self) -> None:
        current = self.state.current
        if current is None:
            return
        registered, reported = set(current.registered), set(current.reported)
        assert current.number == self.state.finished + 1
        assert reported <= registered
        assert set(current.let_go) <= registered
        assert not reported & set(current.let_go)
        assert set(current.accepted) <= reported
        assert registered <= set(current.expected)
        assert current.attempt <= 2
        assert (current.model is None) == (current.released is None) == (current.aggregated_at is None)
        assert not set(current.evaluations) & set(current.not_evaluated)
        assert {*current.evaluations, *current.not_evaluated} <= {*current.accepted, ""}
        assert {*current.statistics, *current.not_measured} <= {*current.accepted}
        assert current.recalibrating == bool(current.unmeasured)
        if self.state.stage is Stage.EVALUATING:
            assert (current.recalibrated_at is not None) == bool(self.state.statistic_tensors)
        assert current.collecting == bool(current.outstanding)
        assert current.measuring == bool(current.unevaluated)

    @invariant()
    def nothing_needed_is_ever_superseded(self) -> None:
        if len(self.events) > 1:
            before = replay("t", self.plan, self.events[:-1])
            assert not superseded(before, self.state) & needed(self.state)
            assert "m0" not in superseded(before, self.state)

    @invariant()
    def what_is_purged_is_neither_needed_nor_worked_with(self) -> None:
        gone = {digest for purge in self.state.purges for digest in purge.digests}
        assert not gone & needed(self.state)
        assert not gone & in_use(self.state)
        assert purged_only([self.state]) == gone
        for command in work(self.state):
            if isinstance(command, Train):
                assert command.impressions not in gone
            if isinstance(command, Synthesise):
                assert command.previous not in gone

    @invariant()
    def what_is_dropped_is_neither_the_best_nor_the_last_nor_needed(self) -> None:
        state = self.state
        gone = {record.model for record in state.records if record.round in state.dropped}
        assert not gone & needed(state)
        assert gone <= self.deleted, "its file is gone at once"
        assert dropped_only([state]).keys() == gone
        if state.best is not None:
            assert not {state.best.round, state.records[-1].round} & state.dropped.keys()
        for command in work(state):
            late = [arrival.model for arrival in command.late] if isinstance(command, Aggregate) else []
            names = ("model", "last_model", "released")
            asked = {getattr(command, name, None) for name in names} | set(late)
            assert not asked & self.deleted

    @invariant()
    def every_finished_round_is_whole_and_counted_once(self) -> None:
        assert [r.round for r in self.state.records] == list(range(1, self.state.finished + 1))
        for record in (finished.record() for finished in self.state.records):
            assert self.plan.min_sites <= record.aggregated <= record.expected
            assert record.aggregated <= len(self.counted[record.round])
            assert len(record.missing) == record.expected - record.aggregated
            assert (record.update_scores is not None) == (self.plan.evaluation.updates_data is not None)
            assert record.update_scores is None or not set(record.update_scores.after) & set(record.missing)

    @invariant()
    def work_is_never_asked_of_a_run_that_is_over_or_paused(self) -> None:
        if self.state.status.final or self.state.status in (Status.QUEUED, Status.PAUSED):
            assert work(self.state) == ()

    @invariant()
    def a_site_alone_is_asked_what_work_asks_of_it(self) -> None:
        by_site = {c.site: c for c in work(self.state) if isinstance(c, SiteCommand)}
        assert {s: task for s in SITES if (task := task_of(self.state, s)) is not None} == by_site

    @invariant()
    def done_means_that_nobody_was_missed(self) -> None:
        if self.state.status is Status.DONE:
            assert not self.state.missed
        if self.state.status is Status.DEGRADED:
            assert self.state.missed


RunMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestRunMachine = RunMachine.TestCase


class FoldingMachine(RunMachine):
    """The same, in a run that folds late updates and parks sites that fail."""

    def __init__(self) -> None:
        super().__init__()
        limits = {
            "round_deadline_s": 100, "stall_timeout_s": 20, "join_wait_s": 5, "late_updates": "fold", "late_rounds": 2,
            "park_after": 2, "park_rounds": 1,
        }  # fmt: skip
        self.plan = make_plan(rounds=5, limits=limits)
        self.state = RunState(run="t", plan=self.plan)
        self.waiting: dict[str, tuple[int, str]] = {}

    def try_event(self, event: ev.Event) -> bool:
        if isinstance(event, ev.AggregationFinished):
            (command,) = [c for c in work(self.state) if isinstance(c, Aggregate)]
            folded = {
                late.site: FoldedUpdate(round=late.round, share=0.5, verdict=UpdateVerdict(passed=True))
                for late in command.late
            }
            event = event.model_copy(update={"folded": folded})
        return super().try_event(event)

    @precondition(lambda self: self.state.stragglers)
    @rule(data=st.data(), works=st.booleans())
    def straggler_ends(self, data: st.DataObject, works: bool) -> None:
        site = data.draw(st.sampled_from(sorted(self.state.stragglers)))
        number = self.state.stragglers[site].round
        if works:
            event: ev.Event = ev.UpdateStored(
                at=self.now, round=number, site=site, digest=f"late-{site}-{number}", payload_bytes=4,
                report=ev.Report(num_examples=3),
            )  # fmt: skip
        else:
            event = ev.SiteLetGo(at=self.now, round=number, site=site, reason="x")
        assert self.try_event(event)
        if works and self.state.stored_update(site, number) is not None:
            self.counted.setdefault(number, set()).add(site)
            assert not self.try_event(event), "the same update is not taken twice"
        self.settle()

    @invariant()
    def stragglers_are_asked_for_their_round_alone(self) -> None:
        current = self.state.current
        asked = [c.site for c in work(self.state) if isinstance(c, Train)]
        assert len(asked) == len(set(asked))
        for site, straggler in self.state.stragglers.items():
            assert straggler.round <= self.state.finished + 1
            assert straggler.model in needed(self.state)
            if current is not None and site in current.registered:
                assert straggler.round == current.number
                assert site in current.slow

    @invariant()
    def no_update_is_counted_twice(self) -> None:
        """An update is in its own round's model or folded into a later one, once."""
        counted = []
        for record in (finished.record() for finished in self.state.records):
            counted += [(record.round, site) for site in record.gate if record.gate[site].passed]
            counted += [(late.round, site) for site, late in record.folded.items()]
            missing = set(record.missing)
            counted += [(record.round, site) for site in SITES if site not in missing]
            assert all(late.round < record.round for late in record.folded.values())
        assert len(counted) == len(set(counted))
        pending = [(late.asked.round, site) for site, late in self.state.late.items()]
        if self.state.stage is not Stage.AGGREGATING and self.state.current is None:
            assert not set(pending) & set(counted)

    @invariant()
    def parked_sites_are_not_asked(self) -> None:
        current = self.state.current
        if current is not None:
            assert not set(self.state.parked) & set(current.registered)
        assert all(parking.until > self.state.finished for parking in self.state.parked.values())


FoldingMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestFoldingMachine = FoldingMachine.TestCase
