"""What is true of a coordinator's parts now, each as one fact: for `fedctl server health` and for `/metrics`.

A fact is found out, never assumed: the database is written to, the compute process is looked at in /proc, a site is well
if it was heard of. `HealthFacts.collect` finds them; the functions below it judge, from plain values.
"""

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509

from fedcore.artifact_store import ArtifactStore
from fedcore.clock import Clock
from fedcore.compute_host import ComputeHost
from fedcore.credential import Credential
from fedcore.database import Database
from fedcore.errors import StorageError
from fedcore.process_state import process_state
from fedcore.renewal import life_of
from fedserver.authority import Authority
from fedserver.drain import Drain
from fedserver.model_keeper import Usage
from fedserver.registry import Registry, utc_now
from fedserver.roster import Roster

# So much of the storage quota may be artifacts that no drop frees.
FULL_SHARE = 0.9
LOW_DISK_BYTES = 2 << 30
# A commit, or a fact on its way into the journal, that takes longer is no longer a healthy one.
SLOW_WRITE_S = 2.0
WRITE_TIMEOUT_S = 5.0
# A compute process gives a sign of life every 5 s while it has a command.
SILENT_S = 30.0
# A site that was not heard of for so long is not just connecting again.
CONTACT_GRACE_S = 120.0
# A member's certificate is renewed when a third of its life is left, at the latest.
_OVERDUE = 0.25
# CAs are renewed by hand (`fedctl cert ca rotate`), which takes planning.
_CA_NOTICE = {"issuing-ca": timedelta(days=60), "root-ca": timedelta(days=180)}
_ROTATE = "plan a change of the CA: fedctl cert ca rotate; below an offline root: fedserver ca request"
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class HealthFact:
    """One thing that was looked at. `subject` is the service or site where there are several of the kind."""

    check: str
    healthy: bool
    # In words, for people.
    says: str
    subject: str = ""
    # What to do about it; empty if it is healthy.
    hint: str = ""
    # For machines; names carry the unit.
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Watched:
    """The parts of a coordinator that are looked at. `services` gives each gRPC service and whether it serves,
    `journal_lag_s` how long the oldest fact waits to be journalled, `drain` the drain in force,
    `usage` what artifacts take.
    """

    database: Database
    store: ArtifactStore
    compute: ComputeHost
    credential: Callable[[], Credential]
    authority: Callable[[], Authority]
    registry: Registry
    roster: Roster
    services: Callable[[], Mapping[str, bool]]
    journal_lag_s: Callable[[], float]
    drain: Callable[[], Drain | None]
    usage: Callable[[], Awaitable[Usage]]


class HealthFacts:
    """Finds the facts. Nothing is kept between two looks."""

    def __init__(self, watched: Watched, clock: Clock, wall: Callable[[], datetime] = utc_now) -> None:
        self._watched = watched
        self._clock = clock
        self._wall = wall

    async def collect(self) -> list[HealthFact]:
        """Look at everything, in the order in which it is shown. Takes at most `WRITE_TIMEOUT_S`; raises nothing."""
        w, now = self._watched, self._wall()
        return [
            *(service_fact(name, serving) for name, serving in sorted(w.services().items())),
            await self._database(),
            journal_fact(w.journal_lag_s()),
            disk_fact(shutil.disk_usage(w.store.root)),
            await self._artifacts(),
            self._compute(),
            certificate_fact(w.credential().certificate, now),
            ca_fact("issuing-ca", w.authority().issuing.certificate, now),
            ca_fact("root-ca", w.authority().root, now),
            *self._sites(now),
            drain_fact(w.drain()),
        ]

    async def _artifacts(self) -> HealthFact:
        try:
            return artifacts_fact(await self._watched.usage())
        except StorageError as error:
            return HealthFact("artifacts", False, error.message, hint=error.hint)

    async def _database(self) -> HealthFact:
        """Write the schema's version over itself: a real commit, which leaves nothing behind."""
        started = self._clock.monotonic()
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self._watched.database.write(
                    lambda c: c.execute(
                        f"PRAGMA user_version={c.execute('PRAGMA user_version').fetchone()[0]}"
                    ).close()
                )
        except TimeoutError:
            return database_fact(WRITE_TIMEOUT_S, f"no commit within {WRITE_TIMEOUT_S:g} s", "")
        except StorageError as error:
            return database_fact(self._clock.monotonic() - started, error.message, error.hint)
        return database_fact(self._clock.monotonic() - started)

    def _compute(self) -> HealthFact:
        compute = self._watched.compute
        state = process_state(compute.pid) if compute.pid is not None else ""
        return compute_fact(compute.exit_status, state, compute.busy_with, compute.silent_s())

    def _sites(self, now: datetime) -> Iterable[HealthFact]:
        roster = self._watched.roster
        for row in self._watched.registry.sites():
            if row.enabled:
                seen = max(roster.last_seen(row.id), row.last_seen, key=_moment)
                yield site_fact(row.id, seen, row.enrolled_at, row.id in roster.sessions, now)


def service_fact(name: str, serving: bool) -> HealthFact:
    """A gRPC service of the coordinator."""
    return HealthFact(
        "service", serving, "serves" if serving else "does not serve", name, "" if serving else "see the log"
    )


def database_fact(write_s: float, failure: str = "", hint: str = "") -> HealthFact:
    """The database: writable, and in what time. `failure` says why not."""
    figures = {"writable": float(not failure), "write_s": write_s}
    if failure:
        return HealthFact("database", False, f"can't be written: {failure}", hint=hint, figures=figures)
    slow = write_s > SLOW_WRITE_S
    hint = "the disk is slow or busy: look at it with iostat" if slow else ""
    return HealthFact("database", not slow, f"writable, a commit took {write_s:.3f} s", "", hint, figures)


def journal_fact(lag_s: float) -> HealthFact:
    """How long the oldest fact waits to become durable."""
    late = lag_s > SLOW_WRITE_S
    says = f"the oldest fact has waited {lag_s:.1f} s to be recorded" if lag_s else "nothing waits"
    hint = "nothing is acknowledged until it is recorded: look at database and disk" if late else ""
    return HealthFact("journal", not late, says, "", hint, {"lag_s": lag_s})


def disk_fact(usage: "shutil._ntuple_diskusage") -> HealthFact:
    """Room where artifacts and database lie."""
    low = usage.free < LOW_DISK_BYTES
    says = f"{usage.free / 1e9:.1f} GB of {usage.total / 1e9:.1f} GB free"
    hint = (
        f"make room: below {LOW_DISK_BYTES / 1e9:.1f} GB rounds may fail; see the runbook disk-full"
        if low
        else ""
    )
    figures = {"free_bytes": float(usage.free), "total_bytes": float(usage.total)}
    return HealthFact("disk", not low, says, "", hint, figures)


def artifacts_fact(usage: Usage) -> HealthFact:
    """What artifacts take, of what they may. A quota that is used up by models which can be dropped is well: they are."""
    figures = {"used_bytes": float(usage.used_bytes), "fixed_bytes": float(usage.fixed_bytes)}
    if usage.quota_bytes is None:
        says = f"{usage.used_bytes / 1e9:.1f} GB, no quota"
        return HealthFact("artifacts", True, says, figures=figures)
    figures["quota_bytes"] = float(usage.quota_bytes)
    full = usage.fixed_bytes >= FULL_SHARE * usage.quota_bytes
    says = (
        f"{usage.used_bytes / 1e9:.1f} GB of a quota of {usage.quota_bytes / 1e9:.1f} GB "
        f"({usage.used_bytes / usage.quota_bytes:.0%}); {usage.fixed_bytes / usage.quota_bytes:.0%} can't be dropped"
    )
    hint = "purge impressions, or raise [storage] quota_gib; see the runbook disk-full" if full else ""
    return HealthFact("artifacts", not full, says, "", hint, figures)


def compute_fact(exit_status: int | None, state: str, busy_with: str | None, silent_s: float) -> HealthFact:
    """The compute process. `state` is its letter in /proc, empty if there is none; `exit_status` how the last one ended."""
    figures = {"alive": float(bool(state) and state not in "ZX"), "silent_s": silent_s}
    again = "it is started again with the next command"
    if not state and exit_status is None:
        return HealthFact(
            "compute", True, "not started yet: it starts with the first command", figures=figures
        )
    if not figures["alive"]:
        status = exit_status or 0
        how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        return HealthFact(
            "compute", False, f"has ended ({how})", "", f"{again}; its last words are in the log", figures
        )
    if state in "Tt":
        return HealthFact("compute", False, "is stopped (SIGSTOP)", "", "send it SIGCONT", figures)
    if busy_with is None:
        return HealthFact("compute", True, "idle", figures=figures)
    if silent_s > SILENT_S:
        says = f"silent for {silent_s:.0f} s during '{busy_with}'"
        return HealthFact(
            "compute", False, says, "", f"collect fedctl server debug-bundle, then kill it: {again}", figures
        )
    return HealthFact("compute", True, f"busy with '{busy_with}'", figures=figures)


def certificate_fact(certificate: x509.Certificate, now: datetime) -> HealthFact:
    """The coordinator's certificate, which renews itself: unwell once it should have."""
    left = certificate.not_valid_after_utc - now
    overdue = left < life_of(certificate) * _OVERDUE
    hint = "its renewal is overdue; the log says what fails" if overdue else ""
    return _certificate("certificate", left, not overdue, hint)


def ca_fact(check: str, certificate: x509.Certificate, now: datetime) -> HealthFact:
    """A CA, "issuing-ca" or "root-ca", which people renew: unwell some time before its end."""
    left = certificate.not_valid_after_utc - now
    near = left < min(_CA_NOTICE[check], life_of(certificate) / 6)
    return _certificate(check, left, not near, _ROTATE if near else "")


def _certificate(check: str, left: timedelta, healthy: bool, hint: str) -> HealthFact:
    days = left.total_seconds() / _DAY_S
    says = f"{days:.1f} days left" if days > 0 else f"ended {-days:.1f} days ago"
    return HealthFact(check, healthy, says, "", hint, {"days_left": days})


def site_fact(site: str, seen: str, enrolled_at: str, connected: bool, now: datetime) -> HealthFact:
    """An enabled site, by when it was heard of last. `seen` is empty if it never was."""
    quiet_s = max(0.0, (now - _moment(seen or enrolled_at)).total_seconds())
    healthy = quiet_s <= CONTACT_GRACE_S
    where = "connected" if connected else "not connected"
    says = (
        f"{where}, last heard of {_ago(quiet_s)} ago"
        if seen
        else f"never connected, enrolled {_ago(quiet_s)} ago"
    )
    hint = "" if healthy else "is its agent running? 'fedagent doctor' at the site finds what is in the way"
    figures = {"connected": float(connected), "last_contact_s": quiet_s}
    return HealthFact("site", healthy, says, site, hint, figures)


def drain_fact(drain: Drain | None) -> HealthFact:
    """Whether rounds may be opened."""
    if drain is None:
        return HealthFact("drain", True, "rounds are opened", figures={"draining": 0.0})
    return HealthFact(
        "drain", False, drain.says, "", "undo it: fedctl server drain --undo", {"draining": 1.0}
    )


def _moment(text: str) -> datetime:
    """RFC 3339 as a moment; long ago if empty."""
    return datetime.fromisoformat(text) if text else datetime.fromtimestamp(0, UTC)


def _ago(seconds: float) -> str:
    for unit, size in (("days", _DAY_S), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
