"""A new run brought to a phase of a round, in which it stays: processes or lines are held, so no fault relies on luck."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from tests.faults.chaos_federation import PIECE_BYTES, SITES, ChaosFederation
from tests.faults.fault_plan import VICTIM, Phase
from tests.federation_fixture import commanded, wait_until

# Held first, so that a round can't end before everything is in place; never the victim.
FIRST, LAST = SITES[0], SITES[2]


@contextmanager
def held_in(
    federation: ChaosFederation,
    document: dict[str, Any],
    phase: Phase,
    round_number: int,
    after_chunk: int = 1,
    open_collection: bool = False,
) -> Iterator[str]:
    """Submit the plan; yield the run's id once it can't leave the phase; let it go on when this is left.

    With `open_collection` the victim's update alone does not complete the round: another site is held too.
    """
    with ExitStack() as still, ExitStack() as first:
        if round_number == 1:
            if open_collection and phase in ("training", "fetching", "uploading"):
                still.enter_context(federation.hold_compute(FIRST))
            run = _first(federation, document, phase, after_chunk, still, first)
        else:
            run = _between(federation, document)
            if phase == "waiting":
                _send_away(federation, still)
            if open_collection and phase in (
                "training",
                "uploading",
            ):  # what is fetched here is the merged model
                still.enter_context(federation.hold_compute(FIRST))
            _arm(federation, phase, after_chunk, still, first)
            if phase != "between rounds":
                federation.control("ResumeRun", run)
        _arrive(federation, run, phase, round_number, after_chunk, still, first)
        yield run
    if phase == "between rounds":
        federation.control("ResumeRun", run)


def _first(
    federation: ChaosFederation,
    document: dict[str, Any],
    phase: Phase,
    after_chunk: int,
    still: ExitStack,
    first: ExitStack,
) -> str:
    if phase == "waiting":
        _send_away(federation, still)
        return federation.submit(document)
    if phase == "aggregating":
        # The first model needs the compute process that is held then.
        with federation.training(document, FIRST) as run:
            still.enter_context(federation.hold_compute("coordinator"))
        return run
    assert phase not in ("between rounds", "synthesising"), "of the second round"
    _arm(federation, phase, after_chunk, still, first)
    return federation.submit(document)


def _between(federation: ChaosFederation, document: dict[str, Any]) -> str:
    """A run that is paused after its first round."""
    with federation.training(document, FIRST) as run:
        federation.control("PauseRun", run)
    federation.wait_phase(run, "PAUSED")
    return run


def _send_away(federation: ChaosFederation, still: ExitStack) -> None:
    federation.relays[LAST].refuse()
    still.callback(federation.relays[LAST].heal)
    federation.wait_away(LAST)


def _arm(
    federation: ChaosFederation, phase: Phase, after_chunk: int, still: ExitStack, first: ExitStack
) -> None:
    """Hold what the phase can't end without; in `first`, what it can't begin before."""
    relay = federation.relays[VICTIM]
    num_bytes = after_chunk * PIECE_BYTES + PIECE_BYTES // 2
    match phase:
        case "training":
            still.enter_context(federation.hold_compute(VICTIM))
        case "fetching":
            relay.hold_after("down", num_bytes)
            still.callback(relay.heal)
        case "uploading":
            relay.hold_after("up", num_bytes)
            still.callback(relay.heal)
        case "aggregating" | "synthesising":
            still.enter_context(federation.hold_compute("coordinator"))
        case "recalibrating" | "evaluating":
            # The training of one can't end before what follows is held at another.
            first.enter_context(federation.hold_compute(FIRST))


def _arrive(
    federation: ChaosFederation,
    run: str,
    phase: Phase,
    round_number: int,
    after_chunk: int,
    still: ExitStack,
    first: ExitStack,
) -> None:
    match phase:
        case "waiting":
            federation.wait_phase(run, "waiting" if round_number > 1 else "WAITING")
        case "training":
            wait_until(lambda: _opened(federation, run) == round_number, "the round")
            wait_until(lambda: commanded(federation.compute_pid(VICTIM)), "the site's command")
        case "fetching":
            partial = federation.site_home(VICTIM) / "artifacts" / "partial"
            wait_until(lambda: any(p.stat().st_size > PIECE_BYTES for p in partial.iterdir()), "a fetch")
        case "uploading":
            arrived = after_chunk * PIECE_BYTES
            wait_until(lambda: (p := federation.part(VICTIM)) and p.stat().st_size >= arrived, "an upload")
        case "aggregating":
            federation.wait_phase(run, "aggregating")
        case "synthesising":
            wait_until(lambda: len(federation.stored(run, round_number)) == len(SITES), "all updates")
            wait_until(lambda: commanded(federation.compute_pid("coordinator")), "the synthesis")
        case "recalibrating" | "evaluating":
            wait_until(
                lambda: len(federation.stored(run, round_number)) == len(SITES) - 1, "the other updates"
            )
            still.enter_context(federation.hold_compute(VICTIM))
            first.close()
            federation.wait_phase(run, phase)
            if phase == "recalibrating":
                wait_until(
                    lambda: len(federation.measured(run, round_number)) == len(SITES) - 1,
                    "the other statistics",
                )


def _opened(federation: ChaosFederation, run: str) -> int:
    return federation.journal(run).count("round_opened")
