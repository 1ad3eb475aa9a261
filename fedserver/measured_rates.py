"""What earlier runs really took: images a second at each site, bytes a second to and from it, the coordinator's phases.

Only runs of the same model count, for training and merging; a transfer counts if it moved about as much. What was never
measured is None, never guessed. Pure.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

from fedcore.plan import Plan
from fedcore.round_record import RoundRecord
from fedserver import round_events as ev

# The newest so many measurements of a kind count.
NEWEST = 10
# A transfer of less than this share of what is to be moved tells mostly how long a connection takes to begin.
COMPARABLE = 0.25
_SHORTEST_S = 0.01
_REFUSAL = "refuses: policy"
K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Past:
    """An earlier run: its plan, its finished rounds, and of its newest events those that this module reads."""

    run: str
    plan: Plan
    records: Sequence[RoundRecord]
    events: Sequence[ev.Event]


@dataclass(frozen=True, slots=True)
class Rates:
    """Medians. `refusals` say which sites' policy refused such a plan last, and in what words."""

    images_per_s: Mapping[str, float] = field(default_factory=dict)
    bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    phases_s: Mapping[str, float] = field(default_factory=dict)
    refusals: Mapping[str, str] = field(default_factory=dict)


# Kinds of events that are read.
KINDS = ("round_opened", "update_stored", "site_let_go")


def measured(plan: Plan, past: Sequence[Past], moved_bytes: int) -> Rates:
    """What is known for a plan from earlier runs, oldest first, that moves `moved_bytes` a site and round."""
    alike = [run for run in past if run.plan.model == plan.model]
    # The strategy decides what a site computes, so its own runs count alone where there are any.
    same = [run for run in alike if run.plan.strategy == plan.strategy]
    return Rates(
        images_per_s=_medians(_image_rates(same or alike)),
        bytes_per_s=_medians(_byte_rates(past, moved_bytes)),
        phases_s=_medians(_phases(same or alike)),
        refusals=_refusals(plan, past),
    )


def _medians(found: Mapping[K, list[float]]) -> dict[K, float]:
    return {key: median(values[-NEWEST:]) for key, values in found.items()}


def _image_rates(past: Iterable[Past]) -> Mapping[str, list[float]]:
    """Training images of the site's own that it went through in a second, what comes with them included."""
    rates: dict[str, list[float]] = defaultdict(list)
    for run in past:
        for record in run.records[-NEWEST:]:
            for site, said in record.training.items():
                seconds, images = float(said.get("seconds", 0)), float(said.get("num_examples", 0))
                if seconds > 0 and images > 0:
                    rates[site].append(images * run.plan.training.epochs / seconds)
    return rates


def _byte_rates(past: Iterable[Past], moved_bytes: int) -> Mapping[str, list[float]]:
    """Bytes over what a round took a site beyond its training: waits included, so the network carries at least that."""
    rates: dict[str, list[float]] = defaultdict(list)
    for run in past:
        opened: ev.RoundOpened | None = None
        made = {record.round: record.impressions.made for record in run.records}
        for event in run.events:
            if isinstance(event, ev.RoundOpened):
                opened = event
            elif isinstance(event, ev.UpdateStored) and opened is not None and opened.round == event.round:
                # The first round fetches a model as well; later ones have it from the evaluation.
                moved = event.payload_bytes * (2 if event.round == 1 else 1)
                moved += made.get(event.round - 1, 0) * math.prod(run.plan.model.input)
                wait_s = event.at - opened.at - event.report.seconds
                if moved >= COMPARABLE * moved_bytes:
                    rates[event.site].append(moved / max(wait_s, _SHORTEST_S))
    return rates


def _phases(past: Iterable[Past]) -> Mapping[str, list[float]]:
    phases: dict[str, list[float]] = defaultdict(list)
    for run in past:
        for record in run.records[-NEWEST:]:
            for name, seconds in record.phases_s.items():
                if name != "training":
                    phases[name].append(seconds)
    return phases


def _refusals(plan: Plan, past: Iterable[Past]) -> dict[str, str]:
    """Sites whose last word on a plan like this one was their policy's refusal."""
    key = _policy_key(plan)
    refusals: dict[str, str] = {}
    for run in past:
        if _policy_key(run.plan) != key:
            continue
        for event in run.events:
            if isinstance(event, ev.UpdateStored):
                refusals.pop(event.site, None)
            elif isinstance(event, ev.SiteLetGo) and event.reason.startswith(_REFUSAL):
                refusals[event.site] = f"{event.reason} (run {run.run}, which was alike)"
    return refusals


def _policy_key(plan: Plan) -> tuple[str, str, int]:
    """What of a plan a site's policy looks at."""
    return plan.model.name, plan.strategy, plan.training.epochs
