"""Every event has its line of words, and the words say why."""

from typing import get_args

import pytest

from fedcore.round_record import RoundRecord
from fedcore.update_verdict import UpdateVerdict
from fedserver import round_events as ev
from fedserver.event_text import event_message, event_text

RECORD = RoundRecord(
    round=2, expected=3, registered=3, started=3, reported=2, aggregated=2, accuracy=0.5, balanced_accuracy=None,
    seconds=4.0, missing={"c": "no connection for 60 s"},
).model_dump_json()  # fmt: skip
REPORT = ev.Report(num_examples=120, train_loss=0.51234, seconds=3.21)
METRICS = ev.Metrics(split="test", num_examples=40, num_correct=30, loss_sum=9.0)

TEXTS: list[tuple[ev.Event, str]] = [
    (
        ev.RunStarted(at=1, sites=("a", "b"), synthesises=True),
        "left the queue with 2 sites: a, b; makes impressions",
    ),
    (
        ev.RunInitialised(
            at=1,
            model="f" * 64,
            update_tensors=(),
            local_tensors=(),
            objective="scaffold",
            objective_options_json="{}",
        ),
        "first model ffffffffffff is there; sites train by 'scaffold'",
    ),
    (
        ev.RoundOpened(
            at=1, round=2, attempt=2, expected=("a",), registered=("a",), reason="1 of 2 sites are here"
        ),
        "opened, attempt 2: 1 of 2 sites are here",
    ),
    (ev.TaskStarted(at=1, round=2, site="a"), "began to train"),
    (
        ev.UpdateStored(at=1, round=2, site="a", digest="d", payload_bytes=4096, report=REPORT),
        "update is stored: 4096 bytes, 120 images, loss 0.512, 3.2 s of training",
    ),
    (ev.SiteLetGo(at=1, round=2, site="a", reason="no progress for 60 s"), "let go: no progress for 60 s"),
    (
        ev.CollectionClosed(at=1, round=2, reason="2 of 3 sites reported"),
        "no further update is taken: 2 of 3 sites reported",
    ),
    (
        ev.AggregationFinished(at=1, round=2, model="m", accepted=("a", "b"), rejected={"c": "NaN"}),
        "merged the updates of a, b; refused: c (NaN)",
    ),
    (
        ev.AggregationFinished(
            at=1,
            round=2,
            model="m",
            accepted=("a", "b"),
            rejected={},
            verdicts={
                "a": UpdateVerdict(
                    passed=True, reason="a moved far; shortened to 3", kept={"parameters": 0.1}
                ),
                "b": UpdateVerdict(passed=True, reason="norm not judged"),
            },
        ),
        "merged the updates of a, b; a moved far; shortened to 3",
    ),
    (
        ev.AggregationFailed(at=1, round=2, reason="nothing passed", rejected={}),
        "nothing could be merged: nothing passed",
    ),
    (
        ev.StatisticsStored(at=1, round=2, site="a", digest="d", num_examples=40),
        "measured the merged model's BatchNorm statistics on 40 images",
    ),
    (
        ev.StatisticsLetGo(at=1, round=2, site="a", reason="late"),
        "statistics are pooled without it: late",
    ),
    (
        ev.StatisticsLost(at=1, round=2, lost={"a": "a's are damaged", "b": "b's too"}),
        "statistics are asked for again: a's are damaged; b's too",
    ),
    (
        ev.ModelRecalibrated(at=1, round=2, model="d", rejected={"c": "far off"}),
        "put the sites' statistics into the model; refused: c (far off)",
    ),
    (
        ev.RecalibrationSkipped(at=1, round=2, reason="nobody answered"),
        "the model keeps the statistics that it was merged with: nobody answered",
    ),
    (
        ev.SynthesisFinished(at=1, round=2, impressions=None, made=0, note="too early"),
        "made no impressions: too early",
    ),
    (ev.SynthesisFinished(at=1, round=2, impressions="d", made=64), "made 64 impressions"),
    (
        ev.EvaluationReported(at=1, round=2, site="", metrics=(METRICS,)),
        "measured the model: on the coordinator's own images: 30 of 40 test images recognised",
    ),
    (ev.UpdatesScored(at=1, round=2, note="no images"), "no images"),
    (ev.EvaluationLetGo(at=1, round=2, site="a", reason="late"), "figures are made without it: late"),
    (
        ev.RoundFinished(at=1, round=2, record_json=RECORD),
        "finished in 4.0 s with 2 of 3 sites, accuracy 50.0 %; missing: c (no connection for 60 s)",
    ),
    (ev.PauseRequested(at=1, by="ann"), "ann asked to pause"),
    (ev.ResumeRequested(at=1, by="ann"), "ann resumed it"),
    (
        ev.ImpressionsPurged(
            at=1, purge="p", rounds=(2, 3), digests=("d", "e"), sites=("a",), by="ann", reason="a face"
        ),
        "ann purged the impressions of rounds 2, 3: a face",
    ),
    (
        ev.PurgeConfirmed(at=1, purge="p", site="a", deleted=("d",), audit_head="7:ff"),
        "removed purged impressions: 1 banks were there",
    ),
    (
        ev.ModelsDropped(at=1, rounds=(1, 2, 4), reason="storage quota"),
        "dropped the models of rounds 1-2, 4: storage quota",
    ),
    (ev.RunFinished(at=1, status="FAILED", reason="no sites"), "FAILED: no sites"),
]


@pytest.mark.parametrize(("event", "text"), TEXTS, ids=lambda x: getattr(x, "kind", ""))
def test_an_event_in_words(event: ev.Event, text: str) -> None:
    assert event_text(event) == text


def test_no_kind_of_event_is_without_words() -> None:
    kinds = set(get_args(get_args(ev.Event)[0]))
    assert {type(event) for event, _ in TEXTS} == kinds


def test_a_message_carries_where_it_happened_and_the_event_itself() -> None:
    event = ev.SiteLetGo(at=1_700_000_000, round=2, site="a", reason="gone")
    message = event_message("t-1", 7, event)
    assert (message.run, message.position, message.round, message.site) == ("t-1", 7, 2, "a")
    assert message.at == "2023-11-14T22:13:20+00:00"
    assert ev.EVENT.validate_json(message.body_json) == event
