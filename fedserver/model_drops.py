"""Which rounds' models a run may give up, and which go. Pure.

A drop is a fact of the run (`ModelsDropped`), so a replayed journal knows that the files are gone. Never dropped: the best
and the last model, and what the run can still ask for while it is under way. What another run needs (it started from it,
say) stays on the disk, also where the run that made it has given it up.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import cast

from fedcore.errors import ConflictError, NotFoundError
from fedcore.text import ranges
from fedserver import round_events as ev
from fedserver.impression_purges import rfc3339_s
from fedserver.round_state import Drop, RunState, kept_models, undroppable


@dataclass(frozen=True, slots=True)
class ToDrop:
    """Rounds of a run whose models should go, and why."""

    run: str
    rounds: tuple[int, ...]
    reason: str


def droppable(state: RunState) -> dict[int, str]:
    """Digest of the model of every round that may be dropped, oldest first."""
    fixed = undroppable(state)
    return {
        record.round: record.model
        for record in state.records
        if record.round not in state.dropped and record.model not in fixed
    }


def has_model(state: RunState, digest: str) -> bool:
    """Whether this is the model of a finished round that was not dropped."""
    return any(r.model == digest and r.round not in state.dropped for r in state.records)


def given_up(state: RunState) -> ToDrop | None:
    """What the plan itself does not keep (`keep_models`); None if nothing more is to go."""
    keep = state.plan.keep_models
    if keep == "all" or len(state.records) - len(state.dropped) <= keep:
        return None
    first_kept = state.records[-keep].round
    rounds = tuple(number for number in droppable(state) if number < first_kept)
    newest = "model" if keep == 1 else f"{keep} models"
    reason = f"the plan keeps the newest {newest} and the best (keep_models = {keep})"
    return ToDrop(state.run, rounds, reason) if rounds else None


def to_free(
    states: Iterable[RunState], sizes: Mapping[str, int], quota_bytes: int, at_most: int
) -> list[ToDrop]:
    """What must go so that the artifacts, whose bytes are `sizes`, stay within the quota; all that may, if that is too
    little; but no more than `at_most` models at a time.

    Runs that are over come first, the oldest of them before the others (`states` are the oldest first), and in each
    run the oldest rounds. Bytes that several runs have go with the last of these, from all of them.
    """
    excess = sum(sizes.values()) - quota_bytes
    if excess <= 0:
        return []
    chosen: dict[str, list[int]] = {}
    for digest, owners in itertools.islice(_shared_out(states).items(), at_most):
        if excess <= 0:
            break
        excess -= sizes.get(digest, 0)
        for run, number in owners:
            chosen.setdefault(run, []).append(number)
    reason = f"storage quota of {quota_bytes / (1 << 30):.4g} GiB ([storage] quota_gib)"
    return [ToDrop(run, tuple(sorted(rounds)), reason) for run, rounds in chosen.items()]


def fixed_bytes(states: Iterable[RunState], sizes: Mapping[str, int]) -> int:
    """Bytes that no drop would free."""
    return sum(sizes.values()) - sum(sizes.get(digest, 0) for digest in _shared_out(states))


def _shared_out(states: Iterable[RunState]) -> dict[str, list[tuple[str, int]]]:
    """Digests that no run needs otherwise, in the order in which they go, each with the (run, round) that have it."""
    found: dict[str, list[tuple[str, int]]] = {}
    fixed: set[str] = set()
    for state in sorted(states, key=lambda state: not state.status.final):
        fixed |= undroppable(state)
        for number, digest in droppable(state).items():
            found[digest] = [*found.pop(digest, ()), (state.run, number)]
    return {digest: owners for digest, owners in found.items() if digest not in fixed}


def apply_drop(state: RunState, event: ev.ModelsDropped) -> RunState:
    """The state after a drop. Raises ConflictError for rounds whose model may not be dropped, or was."""
    fixed = kept_models(
        state
    )  # rather than `droppable`, which goes through all rounds and banks with each drop of a replay
    for number in event.rounds:
        there = 1 <= number <= len(state.records) and number not in state.dropped
        if not there or state.records[number - 1].model in fixed:
            raise ConflictError(
                f"run {state.run}: models to drop are of rounds {ranges(event.rounds)}, expected some of "
                f"{ranges(droppable(state))}"
            )
    if not event.rounds:
        raise ConflictError(f"run {state.run}: models to drop are of no round")
    dropped = dict.fromkeys(event.rounds, Drop(event.at, event.reason))
    return replace(state, dropped=MappingProxyType(cast("dict[int, Drop]", state.dropped) | dropped))


def dropped_only(states: Iterable[RunState]) -> dict[str, float]:
    """Digests of dropped models that no run has otherwise, and when they were dropped last."""
    states = tuple(states)
    found: dict[str, float] = {}
    for state in states:
        for record in state.records:
            if (drop := state.dropped.get(record.round)) is not None:
                found[record.model] = max(drop.at, found.get(record.model, 0.0))
    for state in states:
        for digest in undroppable(state) | set(droppable(state).values()):
            found.pop(digest, None)
    return found


def raise_if_dropped(states: Iterable[RunState], digest: str) -> None:
    """Raise NotFoundError that says when and why a model was dropped, if it was; return if not."""
    for state in states:
        for record in state.records:
            drop = state.dropped.get(record.round)
            if record.model == digest and drop is not None:
                there = [r.round for r in state.records if r.round not in state.dropped]
                raise NotFoundError(
                    f"run {state.run}: the model of round {record.round} was dropped at {rfc3339_s(drop.at)}: "
                    f"{drop.reason}",
                    hint=f"rounds whose model is there: {ranges(there)}",
                )
