"""A round's figures against numbers computed by hand."""

import pytest

from fedcore.impression_check import ImpressionCheck
from fedcore.plan import validate_plan
from fedcore.round_record import RoundRecord
from fedserver.figures import NOT_SHARED, accuracy, held_out, pooled, recalls, round_record
from fedserver.forgetting import update_scores
from fedserver.round_events import Metrics, Report, UpdatesScored
from fedserver.round_state import Round, RunState, Update

PLAN = validate_plan(
    {
        "name": "t", "rounds": 2, "model": {"name": "cnn", "classes": 3, "input": [1, 8, 8]},
        "data": {"class_names": ["x", "y", "z"]},
    }
)  # fmt: skip


def metrics(
    split: str, total: int, correct: int, loss: float = 0.0, totals: str = "", corrects: str = ""
) -> Metrics:
    return Metrics(
        split=split,
        num_examples=total,
        num_correct=correct,
        loss_sum=loss,
        class_totals=tuple(map(int, totals)),
        class_correct=tuple(map(int, corrects)),
    )


def test_pooling_sums_and_keeps_classes_only_if_all_give_them() -> None:
    a = metrics("test", 6, 3, 1.5, "420", "210")
    b = metrics("test", 4, 4, 0.5, "013", "013")
    assert pooled([a, b]) == metrics("test", 10, 7, 2.0, "433", "223")
    assert pooled([a, metrics("test", 5, 5)]) == metrics("test", 11, 8, 1.5)
    assert pooled([a, metrics("test", 0, 0)]) == a
    assert pooled([metrics("test", 0, 0)]) is None
    assert (accuracy(pooled([a, b])), accuracy(None)) == (0.7, None)


def test_recall_leaves_out_classes_that_do_not_occur() -> None:
    assert recalls(metrics("test", 6, 3, 0, "420", "210"), PLAN.class_names) == {"x": 0.5, "y": 0.5}
    assert recalls(metrics("test", 6, 3), PLAN.class_names) is None


def test_test_images_come_first_then_validation() -> None:
    test, validation = metrics("test", 3, 1), metrics("validation", 5, 2)
    assert held_out((validation, test)) == test
    assert held_out((validation, metrics("test", 0, 0))) == validation
    assert held_out(()) is None


CHECK = ImpressionCheck(
    num_checked=6, num_near_in_pixels=1, num_near_in_features=0, num_not_finite=0,
    pixel_limit=0.3, pixel_smallest=0.1, pixel_median=1.1,
)  # fmt: skip


def update(images: int, impressions: int, size: int = 100, check: ImpressionCheck | None = None) -> Update:
    said = Report(
        num_examples=images, num_impressions=impressions, seconds=2.0, train_loss=0.25, impression_check=check
    )
    return Update("d", size, said)


def finished_round() -> Round:
    return Round(
        number=3,
        attempt=2,
        expected=("a", "b", "c", "d", "e"),
        registered=("a", "b", "c", "d"),
        opened_at=100.0,
        absent={"e": "not connected"},
        started=frozenset("abcd"),
        reported={"a": update(6, 5, check=CHECK), "b": update(4, 0, 50), "c": update(1, 0)},
        let_go={"d": "no progress for 9 s"},
        closed_at=110.0,
        model="m" * 64,
        aggregated_at=112.0,
        accepted=("a", "b"),
        rejected={"c": "far from the others"},
        evaluations={
            "a": (metrics("validation", 2, 1), metrics("test", 6, 3, 1.5, "420", "210")),
            "b": (metrics("validation", 2, 2), metrics("test", 4, 4, 0.5, "013", "013")),
        },
        evaluated_at=115.0,
        released="m" * 64,
        synthesised=(40, ""),
        synthesised_at=119.0,
        new_impressions="i" * 64,
    )


def test_the_record_of_a_round() -> None:
    record = round_record(RunState("r", PLAN), finished_round(), now=120.0, bytes_down=777)
    assert (record.round, record.attempts, record.seconds) == (3, 2, 20.0)
    counts = (record.expected, record.registered, record.started, record.reported, record.aggregated)
    assert counts == (5, 4, 4, 3, 2)
    assert record.accuracy == 0.7
    assert record.classes == pytest.approx({"x": 0.5, "y": 2 / 3, "z": 1.0})
    assert record.balanced_accuracy == pytest.approx((0.5 + 2 / 3 + 1.0) / 3)
    assert (record.validation_accuracy, record.loss) == (0.75, 0.2)
    assert {s: (f.accuracy, f.num_examples) for s, f in record.sites.items()} == {
        "a": (0.5, 6),
        "b": (1.0, 4),
    }
    assert (record.impressions.made, record.impressions.used) == (40, {"a": 5, "b": 0, "c": 0})
    assert record.phases_s == {"training": 10, "aggregating": 2, "evaluating": 3, "synthesising": 7}
    assert (record.bytes_up, record.bytes_down) == (250, 777)
    assert record.missing == {
        "c": "update refused: far from the others",
        "d": "no progress for 9 s",
        "e": "not there when the round opened: not connected",
    }
    assert record.training["a"]["train_loss"] == 0.25
    assert not {"num_impressions", "impression_check"} & record.training["a"].keys()
    assert record.impressions.checks == {"a": CHECK}
    assert (record.model, record.impressions_digest) == ("m" * 64, "i" * 64)
    assert record.update_scores is None


def test_what_local_training_did_stands_in_the_record() -> None:
    from dataclasses import replace

    scored = UpdatesScored(
        at=114, round=3, class_totals=(4, 0, 10), before=(4, 0, 5), after={"b": (1, 0, 7), "a": (4, 0, 5)}, note="n"
    )  # fmt: skip
    record = round_record(RunState("r", PLAN), replace(finished_round(), scores=scored), 120.0, 0)
    scores = record.update_scores
    assert scores is not None
    assert scores.num_examples == {"x": 4, "z": 10}, "a class without images has no recall"
    assert scores.before == {"x": 1.0, "z": 0.5}
    assert scores.after == {"a": {"x": 1.0, "z": 0.5}, "b": {"x": 0.25, "z": 0.7}}
    # b lost 0.75 of x; what it gained of z makes up for nothing.
    assert scores.forgetting == {"a": 0.0, "b": 0.375}
    assert (scores.mean_forgetting, scores.note) == (0.1875, "n")
    assert scores.most_lost == {"a": [], "b": ["x"]}
    assert RoundRecord.model_validate_json(record.model_dump_json()) == record


def test_the_classes_most_lost_come_worst_first_and_are_few() -> None:
    names = ("p", "q", "r", "s", "t")
    scored = UpdatesScored(
        at=1, round=1, class_totals=(10,) * 5, before=(9,) * 5, after={"a": (8, 2, 9, 5, 2)}
    )
    assert update_scores(scored, names).most_lost == {"a": ["q", "t", "s"]}


def test_a_round_that_could_not_be_scored_says_why() -> None:
    scores = update_scores(UpdatesScored(at=1, round=1, note="no images"), ("x", "y"))
    assert (scores.note, scores.mean_forgetting, scores.after, scores.forgetting) == (
        "no images",
        None,
        {},
        {},
    )
    lost_all = UpdatesScored(at=1, round=1, class_totals=(2, 0), before=(1, 0), note="a: damaged")
    assert update_scores(lost_all, ("x", "y")).mean_forgetting is None
    assert update_scores(lost_all, ("x", "y")).before == {"x": 0.5}


def test_the_coordinators_own_set_comes_first() -> None:
    current = finished_round()
    own = {**current.evaluations, "": (metrics("test", 8, 2, 0, "800", "200"),)}
    from dataclasses import replace

    record = round_record(RunState("r", PLAN), replace(current, evaluations=own), 120.0, 0)
    assert (record.accuracy, record.balanced_accuracy, set(record.sites)) == (0.25, 0.25, {"a", "b"})


def test_without_class_counts_the_reason_stands_beside_the_null() -> None:
    from dataclasses import replace

    current = replace(finished_round(), evaluations={"a": (metrics("test", 6, 3),)})
    record = round_record(RunState("r", PLAN), current, 120.0, 0)
    assert (record.accuracy, record.balanced_accuracy, record.classes) == (0.5, None, None)
    assert record.balanced_accuracy_note == NOT_SHARED
    nobody = round_record(RunState("r", PLAN), replace(current, evaluations={}), 120.0, 0)
    assert (nobody.accuracy, nobody.loss, nobody.sites) == (None, None, {})


def test_a_clock_that_was_set_back_gives_no_negative_time() -> None:
    record = round_record(RunState("r", PLAN), finished_round(), now=50.0, bytes_down=0)
    assert record.seconds == 0.0
    assert min(record.phases_s.values()) >= 0
