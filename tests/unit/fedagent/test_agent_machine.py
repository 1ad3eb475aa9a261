"""What the agent does with its one compute process."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fedagent.agent_machine import AgentState, Begin, Task, Withdraw, asked, ended, stopped

ONE = Task("train", "r", 1)
TWO = Task("train", "r", 2)
OTHER = Task("train", "s", 1)


def test_the_same_task_asked_again_goes_on() -> None:
    state, actions = asked(AgentState(), ONE)
    assert actions == (Begin(ONE),)
    assert asked(state, ONE) == (state, ())
    assert ended(state, ONE, completed=True) == (AgentState(), ())


def test_a_newer_task_takes_the_place_of_the_older() -> None:
    state, _ = asked(AgentState(), ONE)
    state, actions = asked(state, TWO)
    assert actions == (Withdraw(ONE),)
    assert ended(state, ONE, completed=False) == (AgentState(TWO, TWO), (Begin(TWO),))


def test_the_same_round_from_another_model_is_another_task() -> None:
    """A coordinator restored from a backup asks for a round again, and may have come to another model by then."""
    state, _ = asked(AgentState(), Task("train", "r", 1, "model-1"))
    again = Task("train", "r", 1, "model-2")
    assert asked(state, again)[1] == (Withdraw(Task("train", "r", 1, "model-1")),)


def test_a_task_done_in_the_moment_it_was_replaced_does_not_block_the_newer() -> None:
    state, _ = asked(AgentState(), ONE)
    state, _ = asked(state, TWO)
    assert ended(state, ONE, completed=True)[1] == (Begin(TWO),)


def test_stop_is_for_one_run_or_for_all() -> None:
    state, _ = asked(AgentState(), ONE)
    assert stopped(state, "s") == (state, ())
    for run in ("r", ""):
        after, actions = stopped(state, run)
        assert actions == (Withdraw(ONE),)
        assert ended(after, ONE, completed=False) == (AgentState(), ())
    assert stopped(AgentState(), "") == (AgentState(), ())


def test_asked_again_while_it_is_being_withdrawn_it_begins_again() -> None:
    state, _ = asked(AgentState(), ONE)
    state, _ = stopped(state, "r")
    state, actions = asked(state, ONE)
    assert actions == ()
    assert ended(state, ONE, completed=False)[1] == (Begin(ONE),)


def test_the_end_of_what_is_not_in_progress_changes_nothing() -> None:
    state, _ = asked(AgentState(), ONE)
    assert ended(state, TWO, completed=True) == (state, ())


class Agent(RuleBasedStateMachine):
    """In whatever order is asked and stopped: one task runs at a time, and the newest wanted one gets its turn."""

    def __init__(self) -> None:
        super().__init__()
        self.state = AgentState()
        self.running: Task | None = None
        self.withdrawn = False
        self.newest: Task | None = None

    def perform(self, outcome: tuple[AgentState, tuple[Begin | Withdraw, ...]]) -> None:
        self.state, actions = outcome
        for action in actions:
            if isinstance(action, Begin):
                assert self.running is None, "two tasks at a time"
                self.running, self.withdrawn = action.task, False
            else:
                assert action.task == self.running
                self.withdrawn = True

    @rule(task=st.sampled_from([ONE, TWO, OTHER, Task("evaluate", "r", 1)]))
    def ask(self, task: Task) -> None:
        self.newest = task
        self.perform(asked(self.state, task))

    @rule(run=st.sampled_from(["r", "s", ""]))
    def stop(self, run: str) -> None:
        if self.newest is not None and run in ("", self.newest.run):
            self.newest = None
        self.perform(stopped(self.state, run))

    @precondition(lambda self: self.running is not None)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        task, self.running = self.running, None
        assert task is not None
        completed = data.draw(st.booleans()) if self.withdrawn else True
        if completed and self.newest == task:
            self.newest = None
        self.perform(ended(self.state, task, completed=completed))

    @invariant()
    def the_newest_is_under_way_or_comes_next(self) -> None:
        assert self.state.working == self.running
        if self.newest is None:
            assert self.running is None or self.withdrawn
        else:
            assert self.state.wanted == self.newest
            assert self.running == self.newest or self.withdrawn


TestAgent = Agent.TestCase
TestAgent.settings = settings(max_examples=60, stateful_step_count=30)
