"""The coordinator's metrics: what `fedctl server health` finds out, the run under way, and `run_meter`'s counters.

Nothing here tells of images, labels or classes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from prometheus_client import Counter, Gauge

from fedcore.clock import Clock
from fedcore.database import Database
from fedserver.health_facts import HealthFact, HealthFacts
from fedserver.registry import Registry
from fedserver.roster import Roster
from fedserver.round_driver import RoundDriver, RunView
from fedserver.round_state import Status
from fedserver.run_meter import RunMeter

_DAY_S = 86_400.0
# Figures of health facts -> the gauge that shows them.
_FIGURES = {
    ("database", "write_s"): "database_write_seconds",
    ("journal", "lag_s"): "journal_lag_seconds",
    ("disk", "free_bytes"): "disk_free_bytes",
    ("disk", "total_bytes"): "disk_size_bytes",
    ("artifacts", "used_bytes"): "artifact_bytes",
    ("artifacts", "fixed_bytes"): "artifact_fixed_bytes",
    ("artifacts", "quota_bytes"): "artifact_quota_bytes",
    ("compute", "alive"): "compute_alive",
    ("compute", "silent_s"): "compute_silent_seconds",
    ("drain", "draining"): "draining",
}


@dataclass(frozen=True, slots=True)
class Seen:
    """The parts that are looked at."""

    facts: HealthFacts
    driver: RoundDriver
    roster: Roster
    registry: Registry
    database: Database


class CoordinatorMetrics:
    """The gauges. `look` sets them."""

    def __init__(self, seen: Seen, clock: Clock, meter: RunMeter) -> None:
        self._seen = seen
        self._clock = clock
        self._meter = meter

        registry = meter.registry

        def gauge(name: str, says: str, *labels: str) -> Gauge:
            return Gauge(f"fedimpres_{name}", says, labels, registry=registry)

        self._healthy = gauge("healthy", "What `fedctl server health` says, 1 or 0.", "check", "subject")
        self._plain = {
            "database_write_seconds": gauge("database_write_seconds", "A commit, tried out for this page."),
            "journal_lag_seconds": gauge("journal_lag_seconds", "How long the oldest fact waits to be durable."),
            "disk_free_bytes": gauge("disk_free_bytes", "Room where database and artifacts lie."),
            "disk_size_bytes": gauge("disk_size_bytes", "Size of that file system."),
            "artifact_bytes": gauge("artifact_bytes", "What models, updates and impressions take."),
            "artifact_fixed_bytes": gauge("artifact_fixed_bytes", "What of it no drop of old models would free."),
            "artifact_quota_bytes": gauge("artifact_quota_bytes", "What it may take at most; 0 without a quota."),
            "compute_alive": gauge("compute_alive", "Whether the compute process is there (0 before its first command)."),
            "compute_silent_seconds": gauge("compute_silent_seconds", "Since its last sign of life in a command."),
            "draining": gauge("draining", "Whether an operator keeps rounds from being opened."),
        }  # fmt: skip
        self._certificates = gauge(
            "certificate_left_seconds", "Until it ends: coordinator, issuing-ca, root-ca.", "certificate"
        )
        self._connected = gauge("site_connected", "Whether an enabled site's agent is connected.", "site")
        self._contact = gauge("site_last_contact_seconds", "Since an enabled site was heard of.", "site")
        self._sites = gauge("sites", "Sites by standing: enabled, draining, disabled.", "standing")
        self._queues = gauge("queue_length", "What waits: database writes, directives for agents.", "queue")
        self._runs = gauge("runs", "Runs by state.", "state")
        self._round = gauge("round_number", "The round under way or to be opened next; 0 without a run.")
        self._rounds = gauge("run_rounds", "Rounds that the run under way is to have; 0 without a run.")
        self._phase = gauge("round_phase_seconds", "How long the round is in its phase.", "phase")
        self._deadline = gauge("round_deadline_seconds", "round_deadline_s of the run under way.")
        self._round_sites = gauge(
            "round_sites", "Sites of the run and round under way, by how far they have come.", "state"
        )
        self._sent = Counter(
            "fedimpres_sent_bytes", "Payload of models and impressions sent to sites.", registry=registry
        )
        self._sent_before = 0

    async def look(self) -> None:
        """Set every gauge to what is true now. Raises StorageError."""
        facts = await self._seen.facts.collect()
        self._show_facts(facts)
        self._show_sites()
        self._show_runs()
        queues = {
            "database": self._seen.database.waiting,
            "directives": sum(s.outbox.qsize() for s in self._seen.roster.sessions.values()),
        }
        for queue, length in queues.items():
            self._queues.labels(queue).set(length)
        sent = self._seen.driver.sent_bytes
        self._sent.inc(sent - self._sent_before)
        self._sent_before = sent

    def _show_facts(self, facts: Iterable[HealthFact]) -> None:
        for gauge in (self._healthy, self._connected, self._contact):
            gauge.clear()
        for fact in facts:
            self._healthy.labels(fact.check, fact.subject).set(fact.healthy)
            if fact.check == "site":
                self._connected.labels(fact.subject).set(fact.figures["connected"])
                self._contact.labels(fact.subject).set(fact.figures["last_contact_s"])
            elif "days_left" in fact.figures:
                name = "coordinator" if fact.check == "certificate" else fact.check
                self._certificates.labels(name).set(fact.figures["days_left"] * _DAY_S)
            for figure, value in fact.figures.items():
                if (shown := _FIGURES.get((fact.check, figure))) is not None:
                    self._plain[shown].set(value)

    def _show_sites(self) -> None:
        rows = self._seen.registry.sites()
        self._meter.know(row.id for row in rows)
        standings = [row.decision.standing.value for row in rows]
        for standing in ("enabled", "draining", "disabled"):
            self._sites.labels(standing).set(standings.count(standing))

    def _show_runs(self) -> None:
        states = [view.state.status for view in self._seen.driver.views()]
        for status in Status:
            self._runs.labels(status.value).set(states.count(status))
        self._phase.clear()
        view = self._seen.driver.active()
        if view is not None:
            self._phase.labels(view.state.stage.value).set(self._clock.monotonic() - view.stage_since)
        self._round.set(0 if view is None else view.state.finished + 1)
        self._rounds.set(0 if view is None else view.state.plan.rounds)
        self._deadline.set(0 if view is None else view.state.plan.limits.round_deadline_s)
        for name, number in _round_sites(view).items():
            self._round_sites.labels(name).set(number)


def _round_sites(view: RunView | None) -> dict[str, int]:
    """How many of the run's sites are where in its round; `parked` are left out for a while, having failed."""
    current = view.state.current if view is not None else None
    return {
        "expected": len(current.expected) if current else 0,
        "registered": len(current.registered) if current else 0,
        "started": len(current.started) if current else 0,
        "reported": len(current.reported) if current else 0,
        "let_go": len(current.let_go) if current else 0,
        "parked": len(view.state.parked) if view is not None else 0,
    }
