"""What happened to a run, in words: one line an event, with its reason. Pure."""

from collections.abc import Mapping

from fedcore.round_record import RoundRecord
from fedcore.text import ranges
from fedcore.update_verdict import UpdateVerdict
from fedcore.v1 import operations_pb2
from fedserver import round_events as ev
from fedserver.journal import Submission
from fedserver.recalibration import RecalibrationEvent
from fedserver.run_messages import timestamp


def submission_message(submission: Submission) -> operations_pb2.RunEvent:
    """The beginning of a run's story."""
    plan = submission.plan
    return operations_pb2.RunEvent(
        run=submission.run,
        at=submission.submitted_at,
        kind="run_submitted",
        text=f"submitted by {submission.submitted_by}: {plan.rounds} rounds of {plan.strategy}, model {plan.model.name}",
        body_json="{}",
    )


def event_message(run: str, position: int, event: ev.Event) -> operations_pb2.RunEvent:
    """An event as operators see it. `position` is where it stands in the journal."""
    return operations_pb2.RunEvent(
        run=run,
        position=position,
        at=timestamp(event.at),
        kind=event.kind,
        round=getattr(event, "round", 0),
        site=getattr(event, "site", ""),
        text=event_text(event),
        body_json=event.model_dump_json(),
    )


def event_text(event: ev.Event) -> str:
    """What happened and why; the round and the site are told beside it."""
    match event:
        case ev.RunStarted():
            also = "; makes impressions" if event.synthesises else ""
            return f"left the queue with {len(event.sites)} sites: {', '.join(event.sites)}{also}"
        case ev.RunInitialised():
            return f"first model {event.model[:12]} is there; sites train by '{event.objective}'"
        case ev.RoundOpened():
            again = f", attempt {event.attempt}" if event.attempt > 1 else ""
            return f"opened{again}: {event.reason}"
        case ev.TaskStarted():
            return "began to train"
        case ev.UpdateStored():
            return f"update is stored: {event.payload_bytes} bytes, {_report(event.report)}"
        case ev.SiteLetGo():
            return f"let go: {event.reason}"
        case ev.CollectionClosed():
            return f"no further update is taken: {event.reason}"
        case ev.AggregationFinished():
            merged = f"merged the updates of {', '.join(event.accepted) or 'nobody'}"
            return f"{merged}{_shortened(event.verdicts)}{_refused(event.rejected)}"
        case ev.AggregationFailed():
            return f"nothing could be merged: {event.reason}{_refused(event.rejected)}"
        case (
            ev.StatisticsStored()
            | ev.StatisticsLetGo()
            | ev.StatisticsLost()
            | ev.ModelRecalibrated()
            | ev.RecalibrationSkipped()
        ):
            return _recalibration_text(event)
        case _:
            return _later_text(event)


def _recalibration_text(event: RecalibrationEvent) -> str:
    match event:
        case ev.StatisticsStored():
            return f"measured the merged model's BatchNorm statistics on {event.num_examples} images"
        case ev.StatisticsLetGo():
            return f"statistics are pooled without it: {event.reason}"
        case ev.StatisticsLost():
            return f"statistics are asked for again: {'; '.join(event.lost.values())}"
        case ev.ModelRecalibrated():
            return f"put the sites' statistics into the model{_refused(event.rejected)}"
        case ev.RecalibrationSkipped():
            return f"the model keeps the statistics that it was merged with: {event.reason}"


def _later_text(event: ev.Event) -> str:
    match event:
        case ev.SynthesisFinished():
            made = f"made {event.made} impressions" if event.made else "made no impressions"
            return f"{made}: {event.note}" if event.note else made
        case ev.EvaluationReported():
            who = "" if event.site else "on the coordinator's own images: "
            return f"measured the model: {who}{', '.join(map(_metrics, event.metrics)) or 'no images'}"
        case ev.UpdatesScored():
            return (
                event.note
                or f"scored the updates of {', '.join(event.after)} on the coordinator's own images"
            )
        case ev.EvaluationLetGo():
            return f"figures are made without it: {event.reason}"
        case ev.RoundFinished():
            return _record(RoundRecord.model_validate_json(event.record_json))
        case ev.PauseRequested():
            return f"{event.by} asked to pause"
        case ev.ResumeRequested():
            return f"{event.by} resumed it"
        case ev.ImpressionsPurged():
            rounds = ", ".join(map(str, event.rounds))
            return f"{event.by} purged the impressions of rounds {rounds}: {event.reason}"
        case ev.PurgeConfirmed():
            return f"removed purged impressions: {len(event.deleted)} banks were there"
        case ev.ModelsDropped():
            return f"dropped the models of rounds {ranges(event.rounds)}: {event.reason}"
        case ev.RunFinished():
            return f"{event.status}: {event.reason}"
        case _:
            return event.kind.replace("_", " ")


def _report(report: ev.Report) -> str:
    return f"{report.num_examples} images, loss {report.train_loss:.3g}, {report.seconds:.1f} s of training"


def _refused(rejected: dict[str, str]) -> str:
    if not rejected:
        return ""
    return "; refused: " + "; ".join(f"{site} ({why})" for site, why in sorted(rejected.items()))


def _shortened(verdicts: Mapping[str, UpdateVerdict]) -> str:
    told = [verdict.reason for _, verdict in sorted(verdicts.items()) if verdict.passed and verdict.kept]
    return "".join(f"; {reason}" for reason in told)


def _metrics(metrics: ev.Metrics) -> str:
    return f"{metrics.num_correct} of {metrics.num_examples} {metrics.split} images recognised"


def _record(record: RoundRecord) -> str:
    accuracy = f"accuracy {100 * record.accuracy:.1f} %" if record.accuracy is not None else "no accuracy"
    missing = "; ".join(f"{site} ({why})" for site, why in record.missing.items())
    end = f"; missing: {missing}" if missing else ""
    return f"finished in {record.seconds:.1f} s with {record.aggregated} of {record.expected} sites, {accuracy}{end}"
