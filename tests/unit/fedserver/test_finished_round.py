"""What a finished round leaves in the coordinator's memory, where it stays for as long as the program runs."""

import gc
from collections import Counter
from types import FunctionType, ModuleType

import pytest
from pydantic import ValidationError

from fedcore.plan import Plan
from fedcore.round_record import RoundRecord, SiteFigures
from fedcore.update_verdict import UpdateVerdict
from fedserver.finished_round import FinishedRound
from tests.unit.fedserver.test_impression_purges import make, to_evaluation
from tests.unit.fedserver.test_round_machine import Story, make_plan, world


def record(sites: int) -> RoundRecord:
    names = [f"site-{n}" for n in range(sites)]
    return RoundRecord(
        round=3, expected=sites, registered=sites, started=sites, reported=sites, aggregated=sites, accuracy=0.5,
        balanced_accuracy=0.4, validation_accuracy=0.25, model="m" * 64, impressions_digest="i" * 64,
        sites={name: SiteFigures(accuracy=0.1, num_examples=7) for name in names},
        gate={name: UpdateVerdict(passed=True, reason="", norm=1.5, num_examples=9) for name in names},
        training={name: {"seconds": 1.25, "device": "cpu"} for name in names},
    )  # fmt: skip


def test_nothing_of_a_record_is_lost() -> None:
    whole = record(3)
    finished = FinishedRound.of(whole.model_dump_json())
    assert finished.record() == whole
    assert finished.record_json() == whole.model_dump_json()
    assert (finished.round, finished.validation_accuracy) == (3, 0.25)
    assert (finished.model, finished.impressions_digest) == (whole.model, whole.impressions_digest)


def test_a_line_that_is_no_record_is_refused_at_once() -> None:
    with pytest.raises(ValidationError):
        FinishedRound.of('{"round": 1}')


def held(root: object) -> Counter[str]:
    """Objects that can be reached from `root` alone, by type; classes, functions and modules are everybody's."""
    seen: dict[int, object] = {}
    waiting = [root]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, type | FunctionType | ModuleType | Plan):
            continue
        seen[id(one)] = one
        waiting += gc.get_referents(one)
    return Counter(type(one).__name__ for one in seen.values())


def after(rounds: int) -> Counter[str]:
    """What the state of a run holds when so many rounds are over, each with a bank of its own."""
    plan = make_plan(rounds=100, strategy="fedimpres", synthesis={"warmup_rounds": 1, "images": 4})
    story = Story(plan, synthesises=True)
    story.follow(world())
    for number in range(1, rounds + 1):
        to_evaluation(story, number)
        make(story, number)
        story.follow(world())
    assert story.state.finished == rounds
    return held(story.state)


def test_a_run_holds_a_handful_of_objects_for_each_round_that_is_over() -> None:
    few, many = after(5), after(25)
    assert not {kind.__name__ for kind in (RoundRecord, UpdateVerdict)} & many.keys()
    grown = many - few
    assert grown["FinishedRound"] == 20
    # The round's number, two digests, the figure, the packed record.
    assert grown.total() <= 20 * 8, grown


@pytest.mark.parametrize("sites", [3, 64])
def test_a_record_is_held_in_little_room(sites: int) -> None:
    line = record(sites).model_dump_json()
    assert len(FinishedRound.of(line).packed) < 300 + len(line) / 5
