"""What the coordinator's log says of the events of runs. All there is to know of them stands in the journal."""

import structlog

from fedcore.durability import syncs_so_far
from fedserver import round_events as ev

# Fields of events that are too long for a line of the log.
_NOT_LOGGED = {
    "at", "kind", "record_json", "update_tensors", "local_tensors", "personal_tensors", "metrics", "report",
    "class_totals", "before", "after", "verdicts", "registered_examples", "statistic_tensors",
}  # fmt: skip
# Facts that every site brings in every round, of which the log tells only when it tells all; the journal has them.
_ROUTINE = ev.TaskStarted | ev.StatisticsStored | ev.EvaluationReported
log = structlog.get_logger(__name__)


def log_event(run: str, event: ev.Event) -> None:
    """Log an event that is durable now."""
    if isinstance(event, _ROUTINE):
        log.debug(event.kind.replace("_", " "), run=run, round=event.round, site=event.site)
        return
    if isinstance(event, ev.RecalibrationSkipped):
        log.warning("model not recalibrated", run=run, round=event.round, reason=event.reason)
        return
    fields = event.model_dump(exclude=_NOT_LOGGED)
    if isinstance(event, ev.RoundFinished):
        fields["syncs_so_far"] = syncs_so_far()
    log.info(event.kind.replace("_", " "), run=run, **fields)
