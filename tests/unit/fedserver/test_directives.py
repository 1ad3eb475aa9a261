"""What a site reports: figures that can be are kept, figures that can't be are refused."""

import math
from typing import Any

import pytest

from fedcore.errors import NonFiniteError, TransferError
from fedcore.v1 import federation_pb2
from fedserver.directives import metrics_from_proto, report_from_proto
from fedserver.figures import pooled

GOOD: dict[str, Any] = {
    "split": "test", "num_examples": 10, "num_correct": 6, "loss_sum": 2.5,
    "class_totals": [4, 6, 0], "class_correct": [4, 2, 0],
}  # fmt: skip


def metrics(*splits: dict[str, Any]) -> Any:
    report = federation_pb2.EvaluationReport(
        run="r", round=1, splits=[federation_pb2.SplitMetrics(**split) for split in splits]
    )
    return metrics_from_proto(report, 3, "a round 1")


def test_good_figures_are_kept() -> None:
    validation = {"split": "validation", "num_examples": 3, "num_correct": 3}
    test, other = metrics(GOOD, validation)
    assert test.model_dump() == {**GOOD, "class_totals": (4, 6, 0), "class_correct": (4, 2, 0)}
    assert (other.split, other.num_correct, other.class_totals) == ("validation", 3, ())
    assert metrics() == ()


@pytest.mark.parametrize(("totals", "correct"), [([4, 6], [4, 2]), ([4, 6, 0], []), ([], [6])])
def test_per_class_counts_of_another_length_are_dropped(totals: list[int], correct: list[int]) -> None:
    (split,) = metrics({**GOOD, "class_totals": totals, "class_correct": correct})
    assert (split.class_totals, split.class_correct) == ((), ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_correct": 11}, "says that 11 of 10 test images are recognised"),
        ({"num_correct": -1}, "says that -1 of 10 test images"),
        ({"class_totals": [1, 9, 0], "class_correct": [4, 2, 0]}, "says that 4 of 1 test images of class 0"),
        ({"class_totals": [11, -1, 0]}, "per-class counts of the test images are out of range"),
        ({"class_totals": [11], "class_correct": []}, "per-class counts of the test images are out of range"),
        ({"class_totals": [4, 2, 0]}, "add up to 6 of 6 recognised, expected 6 of 10"),
        ({"class_correct": [4, 3, 0]}, "add up to 7 of 10 recognised, expected 6 of 10"),
        ({"split": "train"}, "reports on split 'train', expected 'validation' or 'test'"),
        ({"split": "\x1b[2J" + "x" * 5_000_000}, "reports on split '[2Jxxx"),
    ],
)
def test_figures_that_can_not_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TransferError) as caught:
        metrics({**GOOD, **change})
    assert caught.value.message.startswith("a round 1: ")
    assert message in caught.value.message
    assert len(caught.value.message) < 200


def test_a_split_stands_once() -> None:
    with pytest.raises(TransferError, match="reports on its test images 1000 times, expected once"):
        metrics(*[GOOD] * 1000)


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1.7e308])
def test_a_loss_that_is_no_number_or_whose_sum_is_none_is_refused(loss: float) -> None:
    with pytest.raises(NonFiniteError, match="its loss on the test images is not a finite number"):
        metrics({**GOOD, "loss_sum": loss})


def test_the_largest_loss_that_is_taken_can_be_summed_over_sites() -> None:
    total = pooled(metrics({**GOOD, "loss_sum": 1e300}) * 2000)
    assert total is not None
    assert total.loss_sum == pytest.approx(2e303)


def test_a_report_names_its_device_in_a_line_and_counts_from_nothing() -> None:
    said = federation_pb2.UpdateReport(num_examples=5, device="\x1b]0;x\x07cuda" + "!" * 100_000)
    device = report_from_proto(said).device
    assert device.startswith("]0;xcuda!!!")
    assert len(device) <= 100
    for name in ("num_steps", "num_impressions", "corrupt_images", "seconds"):
        with pytest.raises(TransferError, match=f"b round 2: its report says {name} = -1"):
            report_from_proto(federation_pb2.UpdateReport(**{"num_examples": 5, name: -1}), "b round 2")
