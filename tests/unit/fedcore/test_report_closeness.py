"""The report's table of how close impressions come to the sites' images."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedcore.impression_check import ImpressionCheck
from fedcore.report.closeness import closeness
from fedcore.report.page import write_report

FOUND: dict[str, Any] = {
    "num_checked": 40, "num_near_in_pixels": 2, "num_near_in_features": 1, "num_not_finite": 0,
    "pixel_limit": 0.345, "pixel_smallest": 0.01, "pixel_median": 1.234,
}  # fmt: skip


def record(number: int, **checks: Any) -> dict[str, Any]:
    return {"round": number, "impressions": {"made": 40, "used": {}, "checks": checks}}


def test_a_row_a_site_of_its_last_check() -> None:
    clean = {**FOUND, "num_near_in_pixels": 0, "num_near_in_features": 0, "mean_distance": 12.345}
    page = closeness([record(1, a=FOUND, b=FOUND), record(2, a=clean), record(3)])
    assert page.count("<tr") == 3
    first = (
        '<tr><td class="left">a</td><td>40</td><td>0</td><td>3</td><td>0.01</td><td>1.23</td><td>0.34</td>'
    )
    assert first in page
    assert "<td>–</td><td>–</td><td>–</td><td>12.35</td><td>–</td></tr>" in page
    assert '<tr class="missed" title="3 of 40 impressions refused: 2 too near a training image' in page
    assert '<td class="left">b (round 1)</td>' in page


def test_names_from_outside_are_escaped() -> None:
    assert "<script>" not in closeness([record(1, **{"<script>": FOUND})])


def test_no_check_no_table(tmp_path: Path) -> None:
    assert closeness([]) == closeness([{"round": 1}, record(2)]) == ""
    path = tmp_path / "report.html"
    for checks, count in (({}, 0), ({"a": FOUND}, 1)):
        write_report(path, title="t", records=[{"loss": None, **record(1, **checks)}])
        assert path.read_text().count("How close impressions come to the sites") == count


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_checked": 0},
        {"num_near_in_pixels": -1},
        {"num_not_finite": 38},
        {"pixel_median": float("nan")},
        {"x": 1},
    ],
)
def test_what_cannot_be_is_no_check(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ImpressionCheck(**{**FOUND, **wrong})


def test_a_check_without_refusals_needs_no_reason() -> None:
    check = ImpressionCheck(**{**FOUND, "num_near_in_pixels": 0, "num_near_in_features": 0})
    assert (check.reason, check.num_trained) == ("", 40)
