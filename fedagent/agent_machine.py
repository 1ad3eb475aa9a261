"""What an agent does with its one compute process, as pure functions. No I/O, no clock.

The coordinator says what it wants now; the newest word counts. A training task is the same task whenever it is asked
for again: in progress it goes on, finished it is answered from the update on disk.
"""

import re
from dataclasses import dataclass, replace

_RUN = re.compile(r"[a-z0-9][a-z0-9._-]{0,79}")


def is_run(text: str) -> bool:
    """Whether `text` may name a run. Runs name folders and files here, so nothing else is taken from the wire."""
    return _RUN.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class Task:
    """Work that the coordinator asked for; equal for the same work, whoever asks when.

    `inputs` names what it starts from: a coordinator restored from a backup may ask for a round again, from another model.
    """

    kind: str  # "train", "recalibrate" or "evaluate"
    run: str
    round: int
    inputs: str = ""


@dataclass(frozen=True, slots=True)
class AgentState:
    """`wanted` is the newest task asked for; `working` the one in progress."""

    wanted: Task | None = None
    working: Task | None = None


@dataclass(frozen=True, slots=True)
class Begin:
    """Start a task."""

    task: Task


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Stop the task in progress; it is not wanted any more."""

    task: Task


def asked(state: AgentState, task: Task) -> tuple[AgentState, tuple[Begin | Withdraw, ...]]:
    """The coordinator asked for a task."""
    wanted = replace(state, wanted=task)
    if state.working is None:
        return replace(wanted, working=task), (Begin(task),)
    if state.working == task:
        return wanted, ()
    return wanted, (Withdraw(state.working),)


def stopped(state: AgentState, run: str) -> tuple[AgentState, tuple[Begin | Withdraw, ...]]:
    """The coordinator does not want a run's work any more; with an empty `run`, no work at all."""
    wanted = None if state.wanted is not None and run in ("", state.wanted.run) else state.wanted
    if state.working is not None and run in ("", state.working.run):
        return replace(state, wanted=wanted), (Withdraw(state.working),)
    return replace(state, wanted=wanted), ()


def ended(
    state: AgentState, task: Task, *, completed: bool
) -> tuple[AgentState, tuple[Begin | Withdraw, ...]]:
    """The task in progress came to its end; `completed` if it was done or failed, not if it was withdrawn."""
    if state.working != task:
        return state, ()
    if state.wanted is None or (state.wanted == task and completed):
        return AgentState(), ()
    return AgentState(wanted=state.wanted, working=state.wanted), (Begin(state.wanted),)
