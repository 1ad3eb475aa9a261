"""What the journal keeps can be replayed: every event comes back as it was, and none holds what JSON has not."""

import math
from collections.abc import Callable
from typing import get_args

import pytest
from pydantic import ValidationError

from fedserver import round_events as ev

METRICS = ev.Metrics(
    split="test", num_examples=5, num_correct=3, loss_sum=0.1, class_totals=(2, 3), class_correct=(1, 2)
)
REPORT = ev.Report(
    num_examples=5, num_steps=2, train_loss=0.3, num_impressions=4, seconds=1e-9, threads=2, device="cuda ☢",
    corrupt_images=1,
)  # fmt: skip
EVENTS: tuple[ev.Event, ...] = (
    ev.RunStarted(at=1.5, sites=("a", "b"), synthesises=True),
    ev.RunInitialised(
        at=1.5, model="m", update_tensors=(("w", "F32", (2, 3)), ("n", "I64", ())), local_tensors=("bn",),
        objective="o", objective_options_json='{"mu": 0.1}', shares_state=True, synthesises_once=True,
    ),
    ev.RoundOpened(
        at=1.5, round=1, attempt=2, expected=("a", "b"), registered=("a",), reason="r", absent={"b": "why"}
    ),
    ev.TaskStarted(at=1.5, round=1, site="a"),
    ev.UpdateStored(at=1.5, round=1, site="a", digest="d", payload_bytes=2**40, report=REPORT),
    ev.SiteLetGo(at=1.5, round=1, site="a", reason="stalled"),
    ev.CollectionClosed(at=1.5, round=1, reason="all"),
    ev.AggregationFinished(
        at=1.5, round=1, model="m", accepted=("a",), rejected={"b": "NaN"}, released="r", strategy_state="s"
    ),
    ev.AggregationFailed(at=1.5, round=1, reason="r", rejected={"b": "NaN"}),
    ev.StatisticsStored(at=1.5, round=1, site="a", digest="d", num_examples=5),
    ev.StatisticsLetGo(at=1.5, round=1, site="b", reason="r"),
    ev.StatisticsLost(at=1.5, round=1, lost={"a": "damaged"}),
    ev.ModelRecalibrated(at=1.5, round=1, model="m", rejected={"b": "far off"}),
    ev.RecalibrationSkipped(at=1.5, round=1, reason="r"),
    ev.SynthesisFinished(at=1.5, round=1, impressions="i", made=3, note="n", figures={"kept": 0.25}),
    ev.EvaluationReported(at=1.5, round=1, site="", metrics=(METRICS,)),
    ev.EvaluationLetGo(at=1.5, round=1, site="a", reason="r"),
    ev.UpdatesScored(
        at=1.5, round=1, class_totals=(2, 3), before=(1, 2), after={"a": (0, 3)}, note="b: damaged"
    ),
    ev.RoundFinished(at=1.5, round=1, record_json='{"round": 1}'),
    ev.PauseRequested(at=1.5, by="operator"),
    ev.ResumeRequested(at=1.5, by="operator"),
    ev.ImpressionsPurged(
        at=1.5, purge="p", rounds=(1, 2), digests=("i", "j"), sites=("a",), by="ann", reason="r"
    ),
    ev.PurgeConfirmed(at=1.5, purge="p", site="a", deleted=("i",), audit_head="7:ab"),
    ev.ModelsDropped(at=1.5, rounds=(1, 2), reason="r"),
    ev.RunFinished(at=1.5, status="DEGRADED", reason="r"),
)  # fmt: skip


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.kind)
def test_every_event_comes_back_from_the_journal_as_it_was(event: ev.Event) -> None:
    assert ev.EVENT.validate_json(event.model_dump_json()) == event


def test_none_is_left_out() -> None:
    kinds = get_args(get_args(ev.Event)[0])
    assert {type(event) for event in EVENTS} == set(kinds)
    assert len(EVENTS) == len(kinds)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: ev.Metrics(split="test", num_examples=1, num_correct=1, loss_sum=x),
        lambda x: ev.Report(num_examples=1, train_loss=x),
        lambda x: ev.Report(num_examples=1, seconds=x),
        lambda x: ev.SynthesisFinished(at=0, round=1, impressions=None, made=0, figures={"kept": x}),
        lambda x: ev.RunFinished(at=x, status="DONE", reason=""),
    ],
)
def test_what_json_has_no_number_for_is_refused_at_once(
    make: Callable[[float], object], value: float
) -> None:
    with pytest.raises(ValidationError, match="finite number"):
        make(value)
