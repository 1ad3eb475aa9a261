"""One real federation for all tests that need one; each test leaves it whole and idle."""

from collections.abc import Iterator

import pytest

from fedcore import reproducibility
from tests.federation_fixture import SITES, Federation, build

# As the programs do: test modules compute while they are collected, and simulations run in this process.
reproducibility.prepare()


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
