"""Commands of the round machine, and what the coordinator's compute process answers, as messages. Pure."""

import json
from typing import Any

from fedcore.errors import NonFiniteError, TransferError
from fedcore.tensor_file import TensorManifest, TensorSpec
from fedcore.text import printable
from fedcore.v1 import federation_pb2, tensor_pb2
from fedserver import round_events as ev
from fedserver.impression_checks import check_from_proto
from fedserver.recalibration import Recalibrate
from fedserver.round_state import RunState
from fedserver.round_work import Evaluate, Train

_SPLITS = ("validation", "test")
_MAX_DEVICE = 100
# A sum over sites of what is below this is a finite number.
_MAX_LOSS_SUM = 1e300


def train_directive(
    state: RunState, command: Train, model_bytes: int, impressions_bytes: int, state_bytes: int = 0
) -> federation_pb2.Directive:
    """Tell a site to train. `*_bytes` are the payloads of the model, the impressions and the strategy's state."""
    task = federation_pb2.TrainTask(
        run=state.run,
        round=command.round,
        model=tensor_pb2.ArtifactRef(digest=command.model, payload_bytes=model_bytes),
        plan_json=state.plan.to_site_json(),
        objective=state.objective,
        objective_options_json=state.objective_options_json,
        local_tensors=state.local_tensors,
        personal_tensors=state.personal_tensors,
    )
    if command.impressions is not None:
        task.impressions.CopyFrom(
            tensor_pb2.ArtifactRef(digest=command.impressions, payload_bytes=impressions_bytes)
        )
    if command.strategy_state is not None:
        task.strategy_state.CopyFrom(
            tensor_pb2.ArtifactRef(digest=command.strategy_state, payload_bytes=state_bytes)
        )
    return federation_pb2.Directive(train=task)


def recalibrate_directive(
    state: RunState, command: Recalibrate, model_bytes: int
) -> federation_pb2.Directive:
    """Tell a site to measure the BatchNorm statistics of a model."""
    return federation_pb2.Directive(
        recalibrate=federation_pb2.RecalibrateTask(
            run=state.run,
            round=command.round,
            model=tensor_pb2.ArtifactRef(digest=command.model, payload_bytes=model_bytes),
            plan_json=state.plan.to_site_json(),
            local_tensors=state.local_tensors,
        )
    )


def evaluate_directive(state: RunState, command: Evaluate, model_bytes: int) -> federation_pb2.Directive:
    """Tell a site to evaluate."""
    return federation_pb2.Directive(
        evaluate=federation_pb2.EvaluateTask(
            run=state.run,
            round=command.round,
            model=tensor_pb2.ArtifactRef(digest=command.model, payload_bytes=model_bytes),
            plan_json=state.plan.to_site_json(),
            local_tensors=state.local_tensors,
            personal_tensors=state.personal_tensors,
        )
    )


def stop_directive(run: str, reason: str) -> federation_pb2.Directive:
    """Tell a site to stop what it does for a run."""
    return federation_pb2.Directive(stop=federation_pb2.StopTask(run=run, reason=reason))


def expected_update(state: RunState) -> TensorManifest:
    """The manifest that every update of the run must have."""
    return TensorManifest.of(
        TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in state.update_tensors
    )


def report_from_proto(report: federation_pb2.UpdateReport, who: str = "a site") -> ev.Report:
    """A site's report as the journal keeps it. `who` opens the message. Raises TransferError for a negative count,
    NonFiniteError for a distance that is no number.
    """
    for name in ("num_examples", "num_steps", "num_impressions", "corrupt_images", "seconds"):
        if getattr(report, name) < 0:
            raise TransferError(
                f"{who}: its report says {name} = {getattr(report, name)}, expected at least 0"
            )
    return ev.Report(
        num_examples=report.num_examples,
        num_steps=report.num_steps,
        train_loss=report.train_loss,
        num_impressions=report.num_impressions,
        seconds=report.seconds,
        threads=report.threads,
        device=printable(report.device, _MAX_DEVICE),
        corrupt_images=report.corrupt_images,
        impression_check=check_from_proto(report.impression_check, who)
        if report.HasField("impression_check")
        else None,
    )


def metrics_from_proto(
    report: federation_pb2.EvaluationReport, classes: int, who: str
) -> tuple[ev.Metrics, ...]:
    """A site's figures as the journal keeps them; per-class counts of another length are dropped.

    `who` opens the message: "site-07 round 12". Raises TransferError for splits and counts that can't be,
    NonFiniteError for a loss that is no number.
    """
    given = [split.split for split in report.splits]
    for name in given[: len(_SPLITS) + 1]:
        if name not in _SPLITS:
            raise TransferError(
                f"{who}: reports on split {printable(name, 40)!r}, expected {' or '.join(map(repr, _SPLITS))}"
            )
        if given.count(name) > 1:
            raise TransferError(
                f"{who}: reports on its {name} images {given.count(name)} times, expected once"
            )
    return tuple(_split_from_proto(split, classes, who) for split in report.splits)


def _split_from_proto(split: federation_pb2.SplitMetrics, classes: int, who: str) -> ev.Metrics:
    if not 0 <= split.num_correct <= split.num_examples:
        raise TransferError(
            f"{who}: says that {split.num_correct} of {split.num_examples} {split.split} images are recognised"
        )
    if any(not 0 <= n <= split.num_examples for n in (*split.class_totals, *split.class_correct)):
        raise TransferError(f"{who}: per-class counts of the {split.split} images are out of range")
    if not abs(split.loss_sum) <= _MAX_LOSS_SUM:  # so written, it catches NaN
        raise NonFiniteError(
            f"{who}: its loss on the {split.split} images is not a finite number",
            hint="the model has diverged: lower the learning rate",
        )
    shared = len(split.class_totals) == len(split.class_correct) == classes
    if shared:
        _check_classes(split, who)
    return ev.Metrics(
        split=split.split,
        num_examples=split.num_examples,
        num_correct=split.num_correct,
        loss_sum=split.loss_sum,
        class_totals=tuple(split.class_totals) if shared else (),
        class_correct=tuple(split.class_correct) if shared else (),
    )


def _check_classes(split: federation_pb2.SplitMetrics, who: str) -> None:
    """Raise TransferError unless the counts of the classes can be, and add up to those of the split."""
    for k, (total, correct) in enumerate(zip(split.class_totals, split.class_correct, strict=True)):
        if correct > total:
            raise TransferError(
                f"{who}: says that {correct} of {total} {split.split} images of class {k} are recognised"
            )
    sums = (sum(split.class_totals), sum(split.class_correct))
    if sums != (split.num_examples, split.num_correct):
        raise TransferError(
            f"{who}: per-class counts of the {split.split} images add up to {sums[1]} of {sums[0]} recognised, "
            f"expected {split.num_correct} of {split.num_examples}"
        )


def initialised_event(result: dict[str, Any], at: float) -> ev.RunInitialised:
    """What the compute command `initialise` answered."""
    return ev.RunInitialised(
        at=at,
        model=result["digest"],
        update_tensors=tuple((name, dtype, tuple(shape)) for name, dtype, shape in result["update_tensors"]),
        local_tensors=tuple(result["local_tensors"]),
        personal_tensors=tuple(result["personal_tensors"]),
        objective=result["objective"],
        objective_options_json=json.dumps(result["objective_options"], sort_keys=True),
        shares_state=result["shares_state"],
        synthesises_once=result["synthesises_once"],
        overlaps=result["overlaps"],
        statistic_tensors=tuple(
            (name, dtype, tuple(shape)) for name, dtype, shape in result["statistic_tensors"]
        ),
    )
