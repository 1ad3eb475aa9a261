"""The matrix: every fault in every phase, as seeded scenarios. What a cell means, and which cells can't be, stands here."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tests.faults.chaos_federation import (
    COMPILER,
    impressions_document,
    recalibrated_document,
    upload_document,
)
from tests.faults.fault_plan import PHASES, VICTIM, FaultPlan, FlippedBit, Phase, TornJournal

# Phases that only the second round has.
_SECOND: tuple[Phase, ...] = ("synthesising", "between rounds")
_LET_GO = {"stall_timeout_s": 3, "join_wait_s": 1}
# How many scenarios of a phase are in `make test`, where they are not five: 40 in all.
_IN_MAKE_TEST: dict[Phase, int] = {"recalibrating": 2, "synthesising": 4, "evaluating": 4}
# Plans of runs that have a phase which others have not.
_DOCUMENTS = {"recalibrating": recalibrated_document, "synthesising": impressions_document}


@dataclass(frozen=True)
class Scenario:
    """A fault plan, the plan of the run that it befalls, and how that run ends."""

    seed: int
    fault: str
    phase: Phase
    plan: FaultPlan
    document: dict[str, Any]
    outcome: str = "DONE"

    def __str__(self) -> str:
        return f"{self.fault}/{self.phase} {self.seed}"

    @property
    def loses(self) -> bool:
        """Whether the fault itself takes updates away that were confirmed, so that sites are rightly asked again."""
        return any(
            isinstance(one, TornJournal) or (isinstance(one, FlippedBit) and one.what == "update")
            for one in self.plan
        )


def impossible(fault: str, phase: Phase) -> str:
    """Why a cell can't be; empty if it can."""
    if fault == "clock jump" and COMPILER is None:
        return "there is no C compiler for preload/world.c (apt-get install gcc)"
    return ""


def scenario(seed: int, fault: str, phase: Phase) -> Scenario:
    """The scenario of a cell that a seed draws."""
    draw = random.Random(f"{seed} {fault} {phase}")
    # A late duplicate needs a round before; a model at a site needs a site that has one.
    needs_earlier = phase == "waiting" and fault in ("duplicate", "reorder", "flipped bit")
    number = 2 if phase in _SECOND or needs_earlier else draw.choice((1, 2))
    plan, outcome = _PLANS[fault](FaultPlan(), draw, phase, number)
    let_go = outcome == "DEGRADED" and fault != "disk full"
    document = _DOCUMENTS.get(phase, upload_document)
    return Scenario(seed, fault, phase, plan, document(limits=_LET_GO if let_go else {}), outcome)


Planned = tuple[FaultPlan, str]


def _kill_coordinator(plan: FaultPlan, draw: random.Random, phase: Phase, number: int) -> Planned:
    return plan.kill("coordinator", power=draw.random() < 0.5, phase=phase, round=number), "DONE"


def _kill_agent(plan: FaultPlan, draw: random.Random, phase: Phase, number: int) -> Planned:
    if phase in ("training", "uploading") and draw.random() < 0.3:
        return plan.kill(VICTIM, for_good=True, phase=phase, round=number), "DEGRADED"
    return plan.kill(VICTIM, power=draw.random() < 0.5, phase=phase, round=number), "DONE"


def _cut(plan: FaultPlan, draw: random.Random, phase: Phase, number: int) -> Planned:
    if draw.random() < 0.4:
        return plan.cut(half_open=True, phase=phase, round=number), "DONE"
    if phase == "uploading":
        return plan.cut_upload(round=number, after_chunk=draw.choice((1, 2))), "DONE"
    return plan.cut(phase=phase, round=number), "DONE"


def _partition(plan: FaultPlan, draw: random.Random, phase: Phase, number: int) -> Planned:
    if phase == "training" and number == 2 and draw.random() < 0.5:
        return plan.partition(seconds=None, phase=phase, round=number), "DEGRADED"
    return plan.partition(seconds=draw.uniform(0.2, 0.8), phase=phase, round=number), "DONE"


def _torn_journal(plan: FaultPlan, draw: random.Random, phase: Phase, number: int) -> Planned:
    # With two, a run that waits for its first round would be lost with its submission.
    records = 1 if (phase, number) == ("waiting", 1) else draw.choice((1, 1, 2))
    return plan.torn_journal(records, phase=phase, round=number), "DONE"


def _flipped_bit(plan: FaultPlan, draw: random.Random, phase: Phase, number: int) -> Planned:
    what = {"uploading": "spool", "fetching": "partial", "aggregating": "update", "synthesising": "update"}
    if phase == "recalibrating" and draw.random() < 0.5:
        what[phase] = "statistics"
    return plan.flipped_bit(what.get(phase, "model"), phase=phase, round=number), "DONE"


def _clock_jump(plan: FaultPlan, draw: random.Random, phase: Phase, number: int) -> Planned:
    # Certificates are valid from ten minutes before they were made.
    who, seconds = draw.choice(("coordinator", VICTIM)), draw.choice((-300, 3600, 86_400))
    return plan.clock_jump(who, seconds, phase=phase, round=number), "DONE"


def _disk_full(plan: FaultPlan, draw: random.Random, phase: Phase, number: int) -> Planned:
    at: dict[str, Any] = {"phase": phase, "round": number}
    match phase:
        case "training":  # the site can't write what it learnt
            return plan.disk_full(f"{VICTIM} compute", **at), "DEGRADED"
        case "fetching":  # the model does not fit: no training in the first round, no figures in the second
            outcome = "DEGRADED" if number == 1 else "DONE"
            return plan.disk_full(VICTIM, 3 << 20, **at), outcome
        case "uploading":  # the last chunk fits in part
            return plan.disk_full("coordinator", 7 << 20, **at), "DONE"
        case "aggregating" | "synthesising":
            return plan.disk_full("compute", **at), "DONE"
        case "recalibrating":  # what arrives can't be stored, or not what is made of it
            return plan.disk_full(draw.choice(("coordinator", "compute")), **at), "DONE"
        case _:  # nothing can be journalled
            return plan.disk_full("coordinator", **at), "DONE"


_PLANS: dict[str, Callable[[FaultPlan, random.Random, Phase, int], Planned]] = {
    "kill coordinator": _kill_coordinator,
    "kill compute": lambda plan, _, phase, number: (plan.kill("compute", phase=phase, round=number), "DONE"),
    "kill agent": _kill_agent,
    "cut": _cut,
    "partition": _partition,
    "slow link": lambda plan, _, phase, number: (plan.slow_link(phase=phase, round=number), "DONE"),
    "disk full": _disk_full,
    "torn journal": _torn_journal,
    "flipped bit": _flipped_bit,
    "duplicate": lambda plan, _, phase, number: (plan.duplicate(phase=phase, round=number), "DONE"),
    "reorder": lambda plan, _, phase, number: (plan.reorder(phase=phase, round=number), "DONE"),
    "clock jump": _clock_jump,
}
FAULTS = tuple(_PLANS)


def cells() -> Iterator[tuple[str, Phase]]:
    """Every fault in every phase."""
    return ((fault, phase) for fault in FAULTS for phase in PHASES)


def matrix(seed: int, repeats: int) -> Iterator[Scenario]:
    """Every cell that can be, `repeats` times, shuffled."""
    possible = [cell for cell in cells() if not impossible(*cell)]
    numbered = [(seed + n, *cell) for n, cell in enumerate(possible * repeats)]
    random.Random(seed).shuffle(numbered)
    for one, fault, phase in numbered:
        yield scenario(one, fault, phase)


def selection(phases: Sequence[Phase], seed: int = 0) -> list[Scenario]:
    """Four or five faults of each phase, two of recalibrating, dealt so that all phases together have each fault three or
    four times.
    """
    dealt = [phase for phase in PHASES for _ in range(_IN_MAKE_TEST.get(phase, 5))]
    return [
        scenario(seed + n, FAULTS[n % len(FAULTS)], phase) for n, phase in enumerate(dealt) if phase in phases
    ]
