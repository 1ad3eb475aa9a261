"""The stage in which BatchNorm statistics are measured anew: who is asked, what becomes of the answers, what is refused."""

import pytest

from fedcore.errors import ConflictError
from fedserver import round_events as ev
from fedserver.recalibration import PoolStatistics, Recalibrate
from fedserver.round_decisions import Presence, World, decide, waiting_for
from fedserver.round_machine import apply
from fedserver.round_state import RunState, Stage, needed, superseded
from fedserver.round_work import Evaluate, Synthesise, Train, task_of, work
from tests.unit.fedserver.test_round_machine import SITES, Story, here, make_plan, world

STATISTICS = (("bn.running_mean", "F32", (2,)), ("bn.running_var", "F32", (2,)))


def merged(*, synthesises: bool = False, released: str | None = None) -> Story:
    """A run whose first round has just merged the updates of all three sites."""
    story = Story(make_plan(strategy="fedimpres" if synthesises else "fedavg"), synthesises=synthesises)
    initialised = story.events.pop()
    assert isinstance(initialised, ev.RunInitialised)
    story.state = apply(
        RunState(run="t-1", plan=story.state.plan),
        ev.RunStarted(at=0, sites=SITES, synthesises=synthesises),
    )
    story.tell(initialised.model_copy(update={"statistic_tensors": STATISTICS}))
    story.follow(world())
    for site in SITES:
        story.report(site)
    story.follow(world())
    story.tell(
        ev.AggregationFinished(at=2, round=1, model="m1", released=released, accepted=SITES, rejected={})
    )
    return story


def answer(story: Story, *sites: str) -> None:
    for site in sites:
        story.tell(ev.StatisticsStored(at=3, round=1, site=site, digest=f"t-{site}", num_examples=7))


def recalibrate(story: Story, model: str = "m1c", rejected: dict[str, str] | None = None) -> None:
    story.tell(ev.ModelRecalibrated(at=4, round=1, model=model, rejected=rejected or {}))


def test_merged_sites_measure_the_merged_model_before_anything_is_made_of_it() -> None:
    story = merged(synthesises=True)
    assert story.state.stage is Stage.RECALIBRATING
    assert work(story.state) == tuple(Recalibrate(1, site, "m1") for site in SITES)
    assert task_of(story.state, "b") == Recalibrate(1, "b", "m1")
    assert waiting_for(story.state, world()) == "round 1: waiting for statistics of a, b, c"
    answer(story, "a", "b")
    assert task_of(story.state, "b") is None
    assert story.follow(world()) == []
    answer(story, "c")
    (command,) = work(story.state)
    assert isinstance(command, PoolStatistics)
    assert [(site, digest) for site, digest, _ in command.statistics] == [(s, f"t-{s}") for s in SITES]
    recalibrate(story)
    assert {type(c) for c in work(story.state)} == {Evaluate, Synthesise}
    assert {c.model for c in work(story.state) if isinstance(c, Evaluate | Synthesise)} == {"m1c"}


def test_sites_go_on_from_the_recalibrated_model_and_the_record_tells_of_it() -> None:
    story = merged()
    answer(story, *SITES)
    recalibrate(story, rejected={"b": "far off"})
    story.evaluate("abc")
    story.follow(world())
    assert {c.model for c in work(story.state) if isinstance(c, Train)} == {"m1c"}
    record = story.state.records[0].record()
    assert record.model == "m1c"
    assert record.recalibration is not None
    assert record.recalibration.num_examples == {"a": 7, "c": 7}
    assert record.recalibration.left_out == {"b": "far off"}
    assert record.phases_s["recalibrating"] == 2


def test_an_average_over_rounds_is_recalibrated_and_the_newest_model_stays() -> None:
    story = merged(released="r1")
    assert {c.model for c in work(story.state) if isinstance(c, Recalibrate)} == {"r1"}
    answer(story, *SITES)
    recalibrate(story, model="r1c")
    story.evaluate("abc")
    story.follow(world())
    assert story.state.records[0].model == "r1c"
    assert {c.model for c in work(story.state) if isinstance(c, Train)} == {"m1"}


def test_with_too_few_statistics_the_round_goes_on_with_the_merged_ones() -> None:
    story = merged()
    answer(story, "a")
    gone = world(now=50, sites=here("a", progress=45))
    lost = decide(story.state, gone)
    assert [type(event) for event in lost] == [ev.StatisticsLetGo, ev.StatisticsLetGo]
    for event in lost:
        story.tell(event)
    assert work(story.state) == ()
    (skipped,) = decide(story.state, gone)
    story.tell(skipped)
    assert story.state.stage is Stage.EVALUATING
    assert {c.model for c in work(story.state) if isinstance(c, Evaluate)} == {"m1"}
    story.evaluate("abc")
    story.follow(world())
    record = story.state.records[0].record()
    assert record.recalibration is not None
    assert record.recalibration.note.startswith("only 1 sites measured, min_sites is 2 (b: no connection for")


def test_statistics_are_pooled_without_a_site_whose_agent_knows_nothing_of_it() -> None:
    story = merged()
    old = Presence(True, "", 0.0, 0.0, knows_recalibration=False)
    answer(story, "a")
    around = World(now=1, wall=1, stage_since=0, sites={**here(), "b": old})
    (event,) = decide(story.state, around)
    assert isinstance(event, ev.StatisticsLetGo)
    assert (event.site, event.reason) == ("b", "its agent is of a version that measures no statistics")
    story.tell(event)
    answer(story, "c")
    (command,) = work(story.state)
    assert isinstance(command, PoolStatistics)
    assert [site for site, _, _ in command.statistics] == ["a", "c"]


def test_the_deadline_is_that_of_a_round() -> None:
    story = merged()
    answer(story, "a", "b")
    quiet = here(progress=99)
    assert decide(story.state, world(now=99, sites=quiet)) == ()
    (event,) = decide(story.state, world(now=101, sites=quiet))
    assert isinstance(event, ev.StatisticsLetGo)
    assert event.reason == "round deadline passed"


def test_sites_whose_stored_statistics_are_damaged_are_asked_again() -> None:
    story = merged()
    answer(story, "a", "b")
    story.tell(ev.StatisticsLetGo(at=3, round=1, site="c", reason="r"))
    story.tell(ev.StatisticsLost(at=4, round=1, lost={"b": "damaged"}))
    assert work(story.state) == (Recalibrate(1, "b", "m1"),)
    assert "t-b" not in needed(story.state)
    answer(story, "b")
    (command,) = work(story.state)
    assert isinstance(command, PoolStatistics)
    assert [site for site, _, _ in command.statistics] == ["a", "b"]


def test_what_is_not_asked_for_is_refused() -> None:
    story = merged()
    answer(story, "a")
    stored = ev.StatisticsStored(at=3, round=1, site="a", digest="t", num_examples=7)
    for event in (
        stored,
        stored.model_copy(update={"site": "z"}),
        stored.model_copy(update={"site": "b", "round": 2}),
        ev.ModelRecalibrated(at=4, round=1, model="m1c"),
        ev.StatisticsLost(at=4, round=1, lost={"a": "nobody looked yet"}),
        ev.RecalibrationSkipped(at=4, round=1, reason="r"),
        ev.EvaluationReported(at=4, round=1, site="a", metrics=()),
    ):
        with pytest.raises(ConflictError):
            apply(story.state, event)
    answer(story, "b", "c")
    with pytest.raises(ConflictError):
        apply(story.state, ev.StatisticsLost(at=4, round=1, lost={"z": "has none"}))


def test_files_stay_while_they_are_needed_and_go_with_the_round() -> None:
    story = merged()
    answer(story, *SITES)
    files = {f"t-{site}" for site in SITES}
    assert files | {"m1"} <= needed(story.state)
    recalibrate(story)
    assert "m1c" in needed(story.state)
    assert "m1" not in needed(story.state)
    story.evaluate("abc")
    before = story.state
    story.follow(world())
    assert files | {"m1"} <= superseded(before, story.state)
    assert "m1c" in needed(story.state)


def test_a_run_that_leaves_statistics_alone_has_no_such_stage() -> None:
    story = Story()
    story.follow(world())
    for site in SITES:
        story.report(site)
    story.follow(world())
    story.aggregate("abc")
    assert story.state.stage is Stage.EVALUATING
    story.evaluate("abc")
    story.follow(world())
    assert story.state.records[0].record().recalibration is None
    assert "recalibrating" not in story.state.records[0].record().phases_s
