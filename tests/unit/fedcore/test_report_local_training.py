"""The report's sections on local training and on impressions over rounds: what is said, and of which round."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.errors import StorageError
from fedcore.report.charts import Series, line_chart
from fedcore.report.local_training import first_with_impressions, local_training, rounds_to_compare
from fedcore.report.page import write_report
from fedcore.report.pictures import Pictures, read_pictures
from fedcore.report.timeline import follow, timeline
from fedcore.tensor_file import TensorSpec, write_tensor_file

NASTY = '<script>alert("x")</script>'


def record(number: int, used: int = 0, forgot: float | None = 0.3, **scores: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "num_examples": {"cat": 20, "dog": 10}, "before": {"cat": 0.9, "dog": 0.5},
        "after": {"north": {"cat": 0.3, "dog": 0.7}, "south": {"cat": 0.9, "dog": 0.5}},
        "forgetting": {"north": forgot, "south": 0.0}, "mean_forgetting": forgot and forgot / 2, "note": "",
    }  # fmt: skip
    if forgot is None:
        found = {"before": {}, "after": {}, "forgetting": {}, "mean_forgetting": None, "note": ""}
    return {
        "round": number, "accuracy": 0.5, "impressions": {"made": 4, "used": {"north": used, "south": 0}},
        "update_scores": found | scores,
    }  # fmt: skip


def bank(round_: int, labels: list[int], born: list[int] | None = None) -> Pictures:
    """Pictures of one pixel whose grey is their position."""
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] + np.zeros((1, 1, 2, 2), np.uint8)
    ages = None if born is None else np.array(born, np.int64)
    return Pictures(round_, images, np.array(labels, np.int64), ages)


def test_forgetting_is_drawn_and_marked_where_impressions_begin() -> None:
    html = local_training([record(1), record(2), record(3, used=5, forgot=0.1)])
    assert 'aria-label="Forgetting by round"' in html
    assert "round 2: the site that forgot most 30.0 %" in html
    assert "round 3: mean of the sites 5.0 %" in html
    assert html.count('class="mark"') == 1
    assert "impressions begin" in html
    assert "without impressions, rounds 1–2 <b>15.0 %</b>" in html
    assert "with impressions, round 3 <b>5.0 %</b>" in html


def test_a_table_before_and_one_after_impressions_began() -> None:
    records = [record(1), record(2), record(3, used=5), record(4, used=5)]
    html = local_training(records)
    assert [part.partition("</h2>")[0] for part in html.split("local training, ")[1:]] == [
        "round 2, without impressions",
        "round 4, with impressions",
    ]
    assert html.count("before, all sites") == 2
    # North lost 60 points of cats and gained 20 of dogs, and the picture says so without colours.
    assert "30<small>−60</small>" in html
    assert "70<small>+20</small>" in html
    assert 'title="north, cat: 90.0 % before, 30.0 % after"' in html
    assert "rgb(var(--fall) / 0.33)" in html
    assert 'title="cat: 20 images"' in html


def test_without_impressions_the_last_round_stands_alone() -> None:
    records = [record(1), record(2)]
    assert first_with_impressions(records) is None
    assert [r["round"] for r in rounds_to_compare(records, None)] == [2]
    html = local_training(records)
    assert 'class="mark"' not in html
    assert "with impressions, round" not in html
    assert [r["round"] for r in rounds_to_compare(records, 1)] == [2], "none was scored before they began"
    assert rounds_to_compare([], 1) == []


def test_nothing_is_said_where_nothing_was_asked() -> None:
    assert local_training([]) == ""
    assert local_training([{"round": 1}, {"round": 2, "update_scores": None}]) == ""


def test_what_was_not_measured_is_told_once_with_its_rounds() -> None:
    html = local_training([record(n, forgot=None, note="no <images>") for n in (1, 2)])
    assert "Rounds 1, 2: no &lt;images&gt;" in html
    assert "<svg" not in html
    assert "<table" not in html
    mixed = local_training([record(1), record(2, note="south: update not scored: x")])
    assert "Round 2: south: update not scored: x" in mixed
    assert mixed.count("<svg") == 1


def test_names_in_the_new_sections_stay_text(tmp_path: Path) -> None:
    scores = {
        "num_examples": {NASTY: 1}, "before": {NASTY: 1.0}, "after": {NASTY: {NASTY: 0.0}}, "forgetting": {NASTY: 1.0},
        "note": NASTY,
    }  # fmt: skip
    write_report(
        tmp_path / "r.html",
        title="t",
        records=[record(1, **scores)],
        impressions=[bank(1, [0]), bank(2, [0])],
        class_names=[NASTY],
    )
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_a_picture_is_followed_for_as_long_as_it_is_kept() -> None:
    banks = [
        bank(3, [0, 1, 0, 0], [3, 3, 3, 3]),
        # New ones come first; what is kept follows in its old order.
        bank(4, [1, 0, 0, 0], [4, 4, 3, 3]),
        bank(5, [0, 0, 1, 1], [5, 4, 5, 4]),
        bank(6, [1], [6]),
    ]
    assert follow(banks, 0) == [(0, 3), (2, 3), (0, 5), None]
    assert follow(banks, 1) == [(1, 3), (0, 4), (3, 4), (0, 6)]
    assert follow([bank(1, [0, 1]), bank(2, [1, 0])], 1) == [(1, None), (0, None)]


def test_the_timeline_shows_each_class_in_each_round() -> None:
    html = timeline([bank(3, [0, 1], [3, 3]), bank(7, [0], [3])], ("cat", "dog"))
    assert "<th>round 3</th><th>round 7</th>" in html
    assert 'alt="impression of cat, round 7, begun in round 3"' in html
    assert html.count("<img") == 3
    assert html.count("<td>–</td>") == 1, "dogs are gone"
    unknown = timeline([bank(1, [0]), bank(2, [0])], ("cat",))
    assert "begun" not in unknown
    assert timeline([bank(3, [0])], ("cat",)) == ""


def test_the_rounds_of_birth_are_read_where_they_are(tmp_path: Path) -> None:
    tensors = {
        "images": (TensorSpec("images", "U8", (2, 1, 2, 2)), bytes(8)),
        "labels": (TensorSpec("labels", "I64", (2,)), np.array([1, 0]).tobytes()),
    }
    path = tmp_path / "bank.safetensors"
    write_tensor_file(path, tensors)
    assert read_pictures(path, 1).born is None
    write_tensor_file(
        path, {**tensors, "born": (TensorSpec("born", "I64", (2,)), np.array([4, 2]).tobytes())}
    )
    born = read_pictures(path, 1).born
    assert born is not None
    assert born.tolist() == [4, 2]
    write_tensor_file(path, {**tensors, "born": (TensorSpec("born", "I64", (1,)), bytes(8))})
    with pytest.raises(StorageError, match="1 rounds of birth for 2 impressions"):
        read_pictures(path, 1)


def test_a_mark_stands_at_its_round_with_its_word_on_the_roomier_side() -> None:
    lines = [Series("a", [0.0, 1.0])]
    early = line_chart([1, 2], lines, label="l", top=1.0, mark=(1, "here & now"))
    assert 'x1="52.0" x2="52.0"' in early
    assert 'text-anchor="start">here &amp; now<' in early
    assert 'text-anchor="end">late<' in line_chart([1, 2], lines, label="l", mark=(2, "late"))
