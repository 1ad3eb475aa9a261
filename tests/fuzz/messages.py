"""What a site says over its stream, records of the journal, and options of strategies."""

import json
from pathlib import Path

from google.protobuf.message import DecodeError, Message
from pydantic import ValidationError

from fedcore.errors import FedimpresError, NonFiniteError, PlanError, TransferError
from fedcore.plan import validate_plan
from fedcore.tensor_file import TensorManifest, TensorSpec, write_tensor_file
from fedcore.tensor_stream import manifest_to_proto
from fedcore.v1 import federation_pb2
from fedserver import round_events as ev
from fedserver.directives import metrics_from_proto, report_from_proto
from fedserver.journal import replay
from fedserver.round_state import RunState
from fedserver.statistics_intake import checked_statistics
from fedserver.strategies import load_strategy
from fedserver.suitability import checked_capabilities, unable_reason
from tests.fuzz.target import BINARY_WORDS, TEXT_WORDS, Target, only

_PLAN_DOCUMENT = {
    "name": "t", "rounds": 2, "min_sites": 1, "strategy": "fedimpres",
    "model": {"name": "cnn", "classes": 3, "input": [1, 8, 8]},
}  # fmt: skip
_PLAN = validate_plan(_PLAN_DOCUMENT)
_REPORT = federation_pb2.UpdateReport(
    num_examples=40, num_steps=3, train_loss=0.5, num_impressions=4, seconds=1.5, threads=2, device="cpu"
)
_FIGURES = federation_pb2.EvaluationReport(
    run="t", round=1,
    splits=[
        federation_pb2.SplitMetrics(
            split="validation", num_examples=6, num_correct=3, loss_sum=2.5, class_totals=[1, 2, 3], class_correct=[1, 1, 1]
        )
    ],
)  # fmt: skip
_MEASURED = (("bn.running_mean", "F32", (2,)), ("bn.running_var", "F32", (2,)))
_STATISTICS = federation_pb2.StatisticsReport(
    run="t", round=1, model="0" * 64, num_examples=40, payload=bytes(16),
    manifest=manifest_to_proto(TensorManifest.of(TensorSpec(*spec) for spec in _MEASURED), "0" * 64),
)  # fmt: skip
_CAPABILITIES = federation_pb2.Capabilities(
    models=["cnn"], objectives=["cross_entropy"], class_names=["0", "1", "2"], num_examples=40, device="cpu"
)
_STORED = ev.UpdateStored(
    at=1.0, round=1, site="a", digest="0" * 64, payload_bytes=8, report=ev.Report(num_examples=40)
)
_EVENTS: tuple[ev.Event, ...] = (
    ev.RunStarted(at=0.0, sites=("a",), synthesises=True),
    ev.RunInitialised(
        at=0.0, model="0" * 64, update_tensors=(("w", "F32", (2,)),), local_tensors=(), objective="cross_entropy",
        objective_options_json="{}",
    ),
    ev.RoundOpened(at=0.0, round=1, attempt=1, expected=("a",), registered=("a",), reason="all are here"),
    _STORED,
)  # fmt: skip


def _survives_the_journal(event: ev.Event) -> None:
    assert ev.EVENT.validate_json(event.model_dump_json()) == event


def check_report(data: bytes, folder: Path) -> None:
    with only(DecodeError, TransferError, NonFiniteError):
        report = report_from_proto(federation_pb2.UpdateReport.FromString(data), "site-07 round 12")
        _survives_the_journal(_STORED.model_copy(update={"report": report}))


def check_figures(data: bytes, folder: Path) -> None:
    with only(DecodeError, TransferError, NonFiniteError):
        said = federation_pb2.EvaluationReport.FromString(data)
        metrics = metrics_from_proto(said, 3, "site-07 round 12")
        _survives_the_journal(ev.EvaluationReported(at=1.0, round=1, site="a", metrics=metrics))


def check_statistics(data: bytes, folder: Path) -> None:
    """What is taken can be stored."""
    state = RunState(run="t", plan=_PLAN, statistic_tensors=_MEASURED)
    with only(DecodeError, TransferError, NonFiniteError):
        said = federation_pb2.StatisticsReport.FromString(data)
        tensors = checked_statistics(state, said, "site-07 round 12")
        assert len(write_tensor_file(folder / "statistics", dict(tensors))) == 64


def check_capabilities(data: bytes, folder: Path) -> None:
    with only(DecodeError):
        kept = checked_capabilities(federation_pb2.Capabilities.FromString(data))
        assert kept.num_examples >= 0
        assert "\n" not in unable_reason(RunState(run="t", plan=_PLAN), kept)


def check_journal(data: bytes, folder: Path) -> None:
    """A record is an event or none, and what was an event has a place in the run or is refused."""
    with only(ValidationError, FedimpresError):
        replay("t", _PLAN, [*_EVENTS, ev.EVENT.validate_json(data)])
    with only(ValidationError, FedimpresError):
        replay("t", _PLAN, [ev.EVENT.validate_json(line) for line in data.split(b"\n")])


def check_options(data: bytes, folder: Path) -> None:
    try:
        options = json.loads(data)
    except (ValueError, RecursionError):
        return
    for strategy in ("fedimpres", "fedopt", "fedprox", "vhl"):
        with only(PlanError):
            load_strategy(
                validate_plan({**_PLAN_DOCUMENT, "strategy": strategy, "strategy_options": options})
            )


def _message(name: str, check: object, message: Message) -> Target:
    return Target(name, check, lambda: [message.SerializeToString()], BINARY_WORDS)  # type: ignore[arg-type]


TARGETS = [
    _message("update_report", check_report, _REPORT),
    _message("evaluation_report", check_figures, _FIGURES),
    _message("statistics_report", check_statistics, _STATISTICS),
    _message("capabilities", check_capabilities, _CAPABILITIES),
    Target(
        "journal",
        check_journal,
        lambda: [
            *(event.model_dump_json().encode() for event in _EVENTS),
            b"\n".join(event.model_dump_json().encode() for event in _EVENTS),
        ],
    ),
    Target(
        "strategy_options",
        check_options,
        lambda: [
            b'{"ema": 0.5, "steps": 20, "fit": "margin", "start": "white", "ratio": 0.5}',
            b'{"mu": 0.1, "beta1": 0.9, "recalibrate": "auto"}',
        ],
        TEXT_WORDS,
    ),
]
