"""Counts what is journalled, as counters for Prometheus. They begin at zero with the coordinator's start."""

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram

from fedserver import round_events as ev
from fedserver.round_state import Status

_COMMIT_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class RunMeter:
    """The counters. `recorded` is given to the journal."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry

        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(f"fedimpres_{name}", says, labels, registry=registry)

        self._commits = Histogram(
            "fedimpres_journal_commit_seconds", "From handing facts to the journal until they are durable.",
            buckets=_COMMIT_BUCKETS_S, registry=registry,
        )  # fmt: skip
        self._updates = counter(
            "updates",
            "Updates by site and what the gate said: accepted, shortened or rejected.",
            "site",
            "verdict",
        )
        self._let_go = counter(
            "sites_let_go", "Rounds that went on without a site they had begun with.", "site"
        )
        self._rounds = counter("rounds_finished", "Rounds that were finished.")
        self._failed = counter("aggregations_failed", "Attempts at a round in which nothing could be merged.")
        self._runs = counter("runs_finished", "Runs that are over, by final state.", "state")
        self._received = counter("received_bytes", "Payload of updates that were stored.")
        self._impressions = counter(
            "impressions", "Impressions by outcome: made, or rejected by the checks.", "outcome"
        )
        # A series that appears with its first event would hide that event from increase().
        for status in Status:
            if status.final:
                self._runs.labels(status.value)
        for outcome in ("made", "rejected"):
            self._impressions.labels(outcome)

    def know(self, sites: Iterable[str]) -> None:
        """Show these sites' counters from now on, at zero."""
        for site in sites:
            for verdict in ("accepted", "shortened", "rejected"):
                self._updates.labels(site, verdict)
            self._let_go.labels(site)

    def recorded(self, events: Sequence[tuple[str, ev.Event]], seconds: float) -> None:
        """Count facts that are durable now; it took `seconds`."""
        self._commits.observe(seconds)
        for _, event in events:
            self._count(event)

    def _count(self, event: ev.Event) -> None:
        match event:
            case ev.UpdateStored():
                self._received.inc(event.payload_bytes)
            case ev.SiteLetGo():
                self._let_go.labels(event.site).inc()
            case ev.AggregationFinished():
                for site in event.accepted:
                    shortened = site in event.verdicts and event.verdicts[site].kept
                    self._updates.labels(site, "shortened" if shortened else "accepted").inc()
                self._reject(event.rejected)
            case ev.AggregationFailed():
                self._failed.inc()
                self._reject(event.rejected)
            case ev.SynthesisFinished():
                self._impressions.labels("made").inc(event.made)
                self._impressions.labels("rejected").inc(max(0.0, event.figures.get("rejected", 0.0)))
            case ev.RoundFinished():
                self._rounds.inc()
            case ev.RunFinished():
                self._runs.labels(event.status).inc()
            case _:
                pass

    def _reject(self, sites: Iterable[str]) -> None:
        for site in sites:
            self._updates.labels(site, "rejected").inc()
