"""A part of `make chaos`: faults while a round is merged, measured, and gone on from. The other part is `test_chaos.py`."""

import pytest

from tests.faults.fault_plan import PHASES
from tests.faults.scenarios import Scenario, selection
from tests.faults.trial import Trials, good


@pytest.mark.timeout(900)
@pytest.mark.parametrize("one", selection(PHASES[4:]), ids=str)
def test_the_run_ends_as_its_policy_says(trials: Trials, one: Scenario) -> None:
    record = trials.run(one)
    assert good(record), record
