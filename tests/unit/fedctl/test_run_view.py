import io
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from fedctl.render import plain, sparkline
from fedctl.run_view import change_line, run_renderable, since, stage_line

NOW = datetime(2026, 1, 2, 3, 5, 35, tzinfo=UTC)


def shown(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def test_live_view_tells_state_sites_and_rounds(make_run: Any, make_record: Any) -> None:
    run = make_run(reason="round 2: waiting for site-1")
    text = shown(run_renderable(run, [make_record(1)], NOW))
    for expected in (
        "blood-1a2b", "RUNNING", "round 2/3", "training for 1m 30s", "round 2: waiting for site-1",
        "rounds that missed a site: 1 (site-2)", "0.5000", "900", "no connection", "75.0 %", "50.0 %", "1/2",
    ):  # fmt: skip
        assert expected in text, expected


def test_live_view_tells_a_lost_connection_and_needs_no_history(make_run: Any) -> None:
    run = make_run(state="QUEUED", round=0, phase="", last_round_json="", progress=[], missed=[])
    text = shown(run_renderable(run, [], NOW, "connection lost (Socket closed); trying again"))
    assert "connection lost" in text
    assert "QUEUED  round 0/3" in text


def test_names_with_brackets_are_no_markup(make_run: Any) -> None:
    run = make_run(name="[red]x[/red]", reason="[bold]why[/bold]")
    text = shown(run_renderable(run, [], NOW))
    assert "[red]x[/red]" in text
    assert "[bold]why[/bold]" in text


def test_lines_change_with_what_is_worth_telling(make_run: Any) -> None:
    first = make_run()
    later = make_run()
    later.progress[0].done += 32
    assert change_line(first) == change_line(later)
    later.progress[0].stage = "delivering"
    assert change_line(first) != change_line(later)
    assert stage_line(first) == stage_line(later) == "RUNNING  1 of 3 rounds  training  accuracy 75.0 %"
    assert stage_line(make_run(state="DONE", last_round_json="")) == "DONE  1 of 3 rounds"


@pytest.mark.parametrize(
    ("moment", "text"), [("", ""), ("2026-01-02T03:05:30Z", "5.0 s"), ("2026-01-02T03:05:40", "0.0 s")]
)
def test_since(moment: str, text: str) -> None:
    assert since(moment, NOW) == text


def test_sparkline_is_a_block_a_value() -> None:
    assert sparkline([0.0, None, 0.5, 1.0]) == "▁ ▅█"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), ("", "–"), (True, "yes"), (0.123456, "0.1235"), (["a", "b"], "a, b"), ([], "–"), (0, "0")],
)
def test_cells(value: Any, text: str) -> None:
    assert plain(value) == text
