"""What goes wrong, in words: `FaultPlan().kill("coordinator", phase="aggregating", round=2)`."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

Phase = Literal[
    "waiting",
    "training",
    "fetching",
    "uploading",
    "aggregating",
    "recalibrating",
    "synthesising",
    "evaluating",
    "between rounds",
]
PHASES: tuple[Phase, ...] = (
    "waiting", "training", "fetching", "uploading", "aggregating", "recalibrating", "synthesising", "evaluating",
    "between rounds",
)  # fmt: skip
# The site that faults befall, unless a plan says otherwise.
VICTIM = "site-b"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong when the run has come to `phase` of `round`, which then can't pass before it is done."""

    phase: Phase
    round: int = 1

    @property
    def name(self) -> str:
        """How the fault is called in chaos.json."""
        return "".join(" " + c.lower() if c.isupper() else c for c in type(self).__name__).strip()


@dataclass(frozen=True)
class Kill(Fault):
    """`kill -9` of "coordinator", "compute" (the coordinator's) or a site's agent; it is started again, unless `for_good`:
    an agent then stays away until the run has ended. With `power`, the machine's power goes: its compute process dies too,
    and what was not synced to the disk is lost (where there is a C compiler; else it is a plain kill).
    """

    who: str = "coordinator"
    for_good: bool = False
    power: bool = False

    @property
    def name(self) -> str:
        return f"kill {self.who if self.who in ('coordinator', 'compute') else 'agent'}"


@dataclass(frozen=True)
class Cut(Fault):
    """A site's connections are reset; with `half_open`, the coordinator does not hear of it."""

    site: str = VICTIM
    half_open: bool = False
    # Of an upload or a fetch that is held: the pieces of 2 MiB that came through before.
    after_chunk: int = 1


@dataclass(frozen=True)
class Partition(Fault):
    """Nothing passes between a site and the coordinator for `seconds`; None: until it is let go of."""

    site: str = VICTIM
    seconds: float | None = 0.5


@dataclass(frozen=True)
class SlowLink(Fault):
    """A site's line carries little from now on, and late."""

    site: str = VICTIM
    bytes_per_s: float = 12e6
    delay_s: float = 0.002


@dataclass(frozen=True)
class DiskFull(Fault):
    """No file of `who` ("coordinator", "compute", a site, "SITE compute") grows beyond `limit_bytes` until that was met."""

    who: str = "coordinator"
    limit_bytes: int = 0


@dataclass(frozen=True)
class TornJournal(Fault):
    """The coordinator is killed, and its disk has lost the last `records` records of the journal, the last of them in the
    middle of a page.
    """

    records: int = 1


@dataclass(frozen=True)
class FlippedBit(Fault):
    """One bit of a file is another: "spool" (what arrived of an upload), "update" or "statistics" (stored at the
    coordinator, the latter of a site that has measured), "model" or "partial" (at a site, whose agent is killed and
    started again).
    """

    what: str = "model"
    site: str = VICTIM


@dataclass(frozen=True)
class Duplicate(Fault):
    """A site's update of the phase's round (or of the last one, while there is none) is delivered once more, by others."""

    site: str = VICTIM


@dataclass(frozen=True)
class Reorder(Fault):
    """A site's chunks come out of order, then its update before the agent's; updates arrive in the sites' reverse order."""

    site: str = VICTIM


@dataclass(frozen=True)
class ClockJump(Fault):
    """The wall clock of a program jumps, and jumps back when the run has ended."""

    who: str = "coordinator"
    seconds: int = 3600


@dataclass(frozen=True)
class FaultPlan:
    """Faults in the order in which they come. Each method gives a plan with one more."""

    faults: tuple[Fault, ...] = field(default=())

    def __iter__(self) -> Iterator[Fault]:
        return iter(self.faults)

    def kill(
        self, who: str, *, phase: Phase, round: int = 1, for_good: bool = False, power: bool = False
    ) -> "FaultPlan":
        return self._and(Kill(phase, round, who, for_good, power))

    def cut(
        self, site: str = VICTIM, *, phase: Phase, round: int = 1, half_open: bool = False
    ) -> "FaultPlan":
        return self._and(Cut(phase, round, site, half_open))

    def cut_upload(self, site: str = VICTIM, *, round: int = 1, after_chunk: int = 1) -> "FaultPlan":
        return self._and(Cut("uploading", round, site, after_chunk=after_chunk))

    def partition(
        self, site: str = VICTIM, seconds: float | None = 0.5, *, phase: Phase, round: int = 1
    ) -> "FaultPlan":
        return self._and(Partition(phase, round, site, seconds))

    def slow_link(self, site: str = VICTIM, *, phase: Phase, round: int = 1) -> "FaultPlan":
        return self._and(SlowLink(phase, round, site))

    def disk_full(self, who: str, limit_bytes: int = 0, *, phase: Phase, round: int = 1) -> "FaultPlan":
        return self._and(DiskFull(phase, round, who, limit_bytes))

    def torn_journal(self, records: int = 1, *, phase: Phase, round: int = 1) -> "FaultPlan":
        return self._and(TornJournal(phase, round, records))

    def flipped_bit(self, what: str, site: str = VICTIM, *, phase: Phase, round: int = 1) -> "FaultPlan":
        return self._and(FlippedBit(phase, round, what, site))

    def duplicate(self, site: str = VICTIM, *, phase: Phase, round: int = 1) -> "FaultPlan":
        return self._and(Duplicate(phase, round, site))

    def reorder(self, site: str = VICTIM, *, phase: Phase, round: int = 1) -> "FaultPlan":
        return self._and(Reorder(phase, round, site))

    def clock_jump(self, who: str, seconds: int, *, phase: Phase, round: int = 1) -> "FaultPlan":
        return self._and(ClockJump(phase, round, who, seconds))

    def _and(self, fault: Fault) -> "FaultPlan":
        return replace(self, faults=(*self.faults, fault))
