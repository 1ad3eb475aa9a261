"""One real federation for all tests that need one; each test leaves it whole and idle."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

from fedcore import reproducibility

# Here and in all that is started: threads that wait for each other take most of their time on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# As the programs do: test modules compute while they are collected, and simulations run in this process.
reproducibility.prepare()
# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("tests", deadline=None, max_examples=50)
hypothesis.settings.load_profile("tests")

from tests.federation_fixture import SITES, Federation, build  # noqa: E402 - after the environment is set


@pytest.fixture(scope="session")
def _session_federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = build(tmp_path_factory.mktemp("federation"))
    yield made
    made.stop()
    made.check_over()


@pytest.fixture
def federation(_session_federation: Federation) -> Iterator[Federation]:
    """A coordinator, four agents that are connected, an operator's context; no run under way before and after."""
    made = _session_federation
    yield made
    if "coordinator" not in made.programs:
        made.start_coordinator()
    made.abort_all()
    for site in SITES:
        if site not in made.programs:
            made.start_agent(site)
    made.wait_connected(*SITES)
    assert all(program.poll() is None for program in made.programs.values()), "a program has died"
