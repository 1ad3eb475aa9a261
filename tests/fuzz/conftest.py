"""How many targets share the minutes of `make fuzz`."""

import pytest

from tests.fuzz.all_targets import TARGETS


@pytest.fixture(scope="session")
def total_targets() -> int:
    return len(TARGETS)
