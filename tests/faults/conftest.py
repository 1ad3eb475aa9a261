"""What the modules of the chaos suite share."""

from collections.abc import Iterator

import pytest

from tests.faults.trial import Trials


@pytest.fixture(scope="module")
def trials() -> Iterator[Trials]:
    standing = Trials({})
    yield standing
    standing.close()
