"""Late updates and parked sites, as a run's state takes them; Hypothesis drives them in test_round_machine.py too."""

import json
from typing import Any

import pytest

from fedcore.errors import ConflictError, PlanError
from fedcore.plan import validate_plan
from fedcore.update_verdict import FoldedUpdate, UpdateVerdict
from fedserver import round_events as ev
from fedserver.journal import replay
from fedserver.round_decisions import Presence, World, decide, waiting_for
from fedserver.round_machine import apply
from fedserver.round_state import RunState, Stage, Status, needed, superseded
from fedserver.round_work import Aggregate, Train, work

SITES = ("a", "b", "c", "d")
PASSED = UpdateVerdict(passed=True)


class Story:
    """A run of four sites, all of them here, in which time passes only when a test says so."""

    def __init__(self, rounds: int = 12, **limits: Any) -> None:
        plan = validate_plan(
            {
                "name": "t", "rounds": rounds, "min_sites": 2, "strategy": "fedavg",
                "model": {"name": "cnn", "classes": 3, "input": [1, 8, 8]},
                "limits": {"round_deadline_s": 1000, "stall_timeout_s": 20, "join_wait_s": 5, **limits},
            }
        )  # fmt: skip
        self.state = RunState(run="t", plan=plan)
        self.events: list[ev.Event] = []
        self.gone: set[str] = set()
        self.tell(ev.RunStarted(at=0, sites=SITES, synthesises=False))
        self.tell(
            ev.RunInitialised(
                at=0,
                model="m0",
                update_tensors=(),
                local_tensors=(),
                objective="o",
                objective_options_json="{}",
            )
        )

    def tell(self, event: ev.Event) -> None:
        before = self.state
        self.state = apply(before, event)
        self.events.append(event)
        assert not superseded(before, self.state) & needed(self.state)

    def world(self, now: float = 0.0) -> World:
        sites = {s: Presence(s not in self.gone, "", 0.0, 0.0, num_examples=7) for s in SITES}
        return World(now=now, wall=now, stage_since=0.0, sites=sites)

    def follow(self, now: float = 0.0) -> list[str]:
        kinds = []
        while events := decide(self.state, self.world(now)):
            for event in events:
                self.tell(event)
                kinds.append(event.kind)
        return kinds

    def report(self, sites: str, number: int) -> None:
        for site in sites:
            self.tell(
                ev.UpdateStored(
                    at=1, round=number, site=site, digest=f"u-{site}-{number}", payload_bytes=8,
                    report=ev.Report(num_examples=7),
                )
            )  # fmt: skip

    def let_go(self, site: str, number: int, *, slow: bool = False) -> None:
        self.tell(ev.SiteLetGo(at=1, round=number, site=site, reason="x", slow=slow))

    def aggregate(self, folded: dict[str, FoldedUpdate] | None = None) -> Aggregate:
        (command,) = [c for c in work(self.state) if isinstance(c, Aggregate)]
        sites = tuple(site for site, _, _ in command.updates)
        taken = {
            late.site: FoldedUpdate(round=late.round, share=0.5, verdict=PASSED) for late in command.late
        }
        self.tell(
            ev.AggregationFinished(
                at=2,
                round=command.round,
                model=f"m{command.round}",
                accepted=sites,
                rejected={},
                folded=taken,
            )
        )
        return command

    def evaluate(self) -> None:
        assert self.state.current is not None
        for site in self.state.current.unevaluated:
            metrics = (ev.Metrics(split="test", num_examples=2, num_correct=1, loss_sum=1.0),)
            self.tell(
                ev.EvaluationReported(at=3, round=self.state.current.number, site=site, metrics=metrics)
            )

    def round(self, number: int, sites: str, failing: str = "", slow: str = "") -> Aggregate:
        """A whole round, up to the opening of the next."""
        self.follow()
        for site in failing + slow:
            self.let_go(site, number, slow=site in slow)
        self.report(sites, number)
        self.follow()
        command = self.aggregate()
        self.evaluate()
        self.follow()
        return command

    def asked(self) -> dict[str, int]:
        return {c.site: c.round for c in work(self.state) if isinstance(c, Train)}


def test_a_late_update_goes_into_the_next_aggregation_once() -> None:
    story = Story(late_updates="fold")
    story.round(1, "abc", slow="d")
    assert story.asked() == {"a": 2, "b": 2, "c": 2, "d": 1}, (
        "the straggler goes on, and is asked nothing else"
    )
    (straggler,) = [c for c in work(story.state) if isinstance(c, Train) and c.site == "d"]
    assert straggler == Train(1, 1, "d", "m0", None, None)
    assert "m0" in needed(story.state)
    assert story.state.current is not None
    assert story.state.current.absent == {"d": "still at work on round 1; its update counts when it comes"}
    assert waiting_for(story.state, story.world()).endswith("updates of a, b, c")
    story.report("d", 1)
    assert "u-d-1" in needed(story.state)
    story.report("abc", 2)
    story.follow()
    command = story.aggregate()
    (late,) = command.late
    assert (late.site, late.round, late.model, late.digest, late.registered_examples) == (
        "d",
        1,
        "m0",
        "u-d-1",
        7,
    )
    with pytest.raises(ConflictError):
        story.report("d", 1)
    before = story.state
    story.evaluate()
    story.follow()
    assert "u-d-1" in superseded(before, story.state)
    record = story.state.records[1].record()
    assert record.folded == {"d": FoldedUpdate(round=1, share=0.5, verdict=PASSED)}
    assert record.bytes_up == 4 * 8
    assert story.asked() == dict.fromkeys(SITES, 3)
    assert story.round(3, "abcd").late == ()
    assert [r.record().folded for r in story.state.records] == [{}, record.folded, {}]


def test_an_update_that_comes_while_its_round_is_merged_waits_for_the_next() -> None:
    story = Story(late_updates="fold")
    story.follow()
    story.let_go("d", 1, slow=True)
    story.report("abc", 1)
    story.follow()
    before = work(story.state)
    story.report("d", 1)
    assert [c for c in before if isinstance(c, Aggregate)] == [
        c for c in work(story.state) if isinstance(c, Aggregate)
    ]
    assert story.aggregate().late == ()
    story.evaluate()
    story.follow()
    assert story.asked() == dict.fromkeys(SITES, 2), "it is here again"
    assert story.state.failures == {}
    assert [late.digest for late in story.round(2, "abcd").late] == ["u-d-1"]


def test_an_update_that_comes_before_its_round_closes_is_in_time() -> None:
    story = Story(late_updates="fold")
    story.follow()
    story.let_go("d", 1, slow=True)
    assert story.asked() == dict.fromkeys(SITES, 1)
    story.report("abd", 1)
    story.report("c", 1)
    story.follow()
    assert [site for site, _, _ in story.aggregate().updates] == list(SITES)


def test_an_aggregation_that_failed_keeps_late_updates_for_its_repetition() -> None:
    story = Story(late_updates="fold")
    story.round(1, "abc", slow="d")
    story.report("d", 1)
    story.report("abc", 2)
    story.follow()
    story.tell(ev.AggregationFailed(at=1, round=2, reason="x", rejected={"a": "x"}))
    story.follow()
    story.report("ad", 2)
    story.follow()
    assert [late.digest for late in story.aggregate().late] == ["u-d-1"]


def test_a_late_update_of_a_round_that_is_repeated_is_in_time() -> None:
    story = Story(late_updates="fold")
    story.follow()
    story.let_go("d", 1, slow=True)
    story.report("abc", 1)
    story.follow()
    story.report("d", 1)
    story.tell(ev.AggregationFailed(at=1, round=1, reason="x", rejected={"a": "x"}))
    story.follow()
    assert story.asked() == {"a": 1}
    story.report("a", 1)
    story.follow()
    command = story.aggregate()
    assert command.late == ()
    assert [digest for _, digest, _ in command.updates] == ["u-a-1", "u-b-1", "u-c-1", "u-d-1"]


def test_a_straggler_that_fails_or_takes_too_long_is_asked_like_the_others_again() -> None:
    story = Story(late_updates="fold", late_rounds=2)
    story.round(1, "ab", slow="cd")
    story.let_go("c", 1)
    assert story.asked() == {"a": 2, "b": 2, "d": 1}
    story.round(2, "ab")
    assert story.asked() == {"a": 3, "b": 3, "c": 3, "d": 1}
    story.round(3, "abc")
    assert story.asked() == dict.fromkeys(SITES, 4)
    with pytest.raises(ConflictError):
        story.report("d", 1)


def test_models_that_late_updates_started_from_are_kept_and_then_go() -> None:
    """Under an average over rounds, what sites train from is nobody's result, and goes with its round."""
    story = Story(late_updates="fold")
    story.round(1, "abcd")
    story.state = apply_released(story)
    story.report("abc", 2)
    story.let_go("d", 2, slow=True)
    story.follow()
    story.aggregate()
    story.evaluate()
    story.follow()
    assert "trained-1" in needed(story.state)
    before = story.state
    story.let_go("d", 2)
    assert superseded(before, story.state) == {"trained-1"}


def apply_released(story: Story) -> RunState:
    """The state if the first round's model were not the one that it released."""
    from dataclasses import replace

    return replace(story.state, model="trained-1")


def test_late_updates_are_dropped_unless_the_plan_folds() -> None:
    story = Story()
    story.round(1, "abc", slow="d")
    assert story.state.stragglers == {}
    assert story.asked() == dict.fromkeys(SITES, 2)
    assert not story.state.awaits_update("d", 1)
    with pytest.raises(ConflictError):
        story.report("d", 1)


def test_folding_goes_with_means_only() -> None:
    with pytest.raises(
        PlanError, match=r"late_updates is 'fold', which goes with .* mean and norm_clip: median"
    ):
        validate_plan(
            {
                "name": "t", "rounds": 1, "model": {"name": "cnn", "classes": 3, "input": [1, 8, 8]},
                "limits": {"late_updates": "fold"}, "aggregation": {"rule": "median"},
            }
        )  # fmt: skip


def test_a_site_that_fails_again_and_again_is_parked_and_comes_back_by_itself() -> None:
    story = Story(park_after=2, park_rounds=2)
    story.round(1, "abc", failing="d")
    assert story.asked() == dict.fromkeys(SITES, 2)
    story.round(2, "abc", failing="d")
    reason = "parked until round 5, after 2 failed rounds in a row; last: x"
    for number in (3, 4):
        assert story.asked() == dict.fromkeys("abc", number), "nobody waits for it"
        assert story.state.parked["d"].reason == reason
        story.round(number, "abc")
        assert story.state.records[-1].record().missing == {"d": f"not there when the round opened: {reason}"}
    assert story.state.parked == {}
    assert story.asked() == dict.fromkeys(SITES, 5)
    story.round(5, "abc", failing="d")
    assert story.state.parked["d"].until == 8, "one more failure parks it again"
    for number in (6, 7):
        story.round(number, "abc")
    story.round(8, "abcd")
    assert story.state.failures == {}
    story.round(9, "abc", failing="d")
    assert story.state.parked == {}


def test_a_refused_update_is_a_failed_round() -> None:
    story = Story(park_after=1, park_rounds=1)
    story.follow()
    story.report("abcd", 1)
    story.follow()
    story.tell(
        ev.AggregationFinished(at=2, round=1, model="m1", accepted=("a", "b", "c"), rejected={"d": "norm"})
    )
    story.evaluate()
    story.follow()
    assert (
        story.state.parked["d"].reason == "parked until round 3, after 1 failed rounds in a row; last: norm"
    )


def test_parked_sites_are_asked_after_all_when_the_others_are_too_few() -> None:
    story = Story(park_after=1, park_rounds=9)
    story.round(1, "ab", failing="cd")
    assert story.asked() == {"a": 2, "b": 2}
    story.report("ab", 2)
    story.follow()
    story.aggregate()
    story.gone = {"b"}
    story.evaluate()
    story.follow(now=10)
    assert story.asked() == {"a": 3, "c": 3, "d": 3}
    assert story.state.parked == {}


def test_sites_that_were_not_there_are_not_parked_for_it() -> None:
    story = Story(park_after=1)
    story.gone = {"d"}
    story.follow(now=10)
    story.report("abc", 1)
    story.follow(now=10)
    story.aggregate()
    story.evaluate()
    story.follow(now=10)
    assert story.state.parked == {}
    assert story.state.failures == {}


def test_replay_equals_live_and_an_older_journal_is_read() -> None:
    story = Story(rounds=5, late_updates="fold", park_after=2)
    story.round(1, "abc", slow="d")
    story.report("d", 1)
    story.round(2, "ab", failing="c")
    story.round(3, "abd", failing="c")
    texts = [ev.EVENT.dump_json(event) for event in story.events]
    again = replay("t", story.state.plan, [ev.EVENT.validate_json(text) for text in texts])
    assert again == story.state
    assert again.parked
    older = []
    for text in texts:
        fields = json.loads(text)
        for key in ("slow", "folded", "verdicts", "merge", "registered_examples"):
            fields.pop(key, None)
        older.append(ev.EVENT.validate_python(fields))
    plain = Story(rounds=5)
    plain.round(1, "abc", slow="d")
    assert replay("t", plain.state.plan, [e for e in older if e.at >= 0][: len(plain.events)]).finished == 1


def test_a_run_that_is_over_or_paused_asks_nothing_of_stragglers() -> None:
    story = Story(late_updates="fold")
    story.follow()
    story.tell(ev.PauseRequested(at=1, by="o"))
    story.let_go("d", 1, slow=True)
    story.report("abc", 1)
    story.follow()
    story.aggregate()
    story.evaluate()
    story.follow()
    assert story.state.stage is Stage.PAUSED
    assert work(story.state) == ()
    story.report("d", 1)  # what is there counts all the same
    story.tell(ev.ResumeRequested(at=1, by="o"))
    story.follow()
    assert [late.digest for late in story.round(2, "abcd").late] == ["u-d-1"]
    story.tell(ev.RunFinished(at=9, status="ABORTED", reason="o"))
    assert story.state.status is Status.ABORTED
    assert (story.state.stragglers, story.state.late) == ({}, {})
