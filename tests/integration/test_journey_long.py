"""The long journey of a federation, told in tests/integration/journey_long.py."""

from pathlib import Path

import pytest

from tests.integration import journey_long


@pytest.mark.slow
def test_a_federation_lives_through_renewal_theft_a_new_ca_and_the_loss_of_its_coordinator(
    tmp_path: Path,
) -> None:
    told: list[str] = []
    journey_long.travel(tmp_path, lambda line: (told.append(line), print(line))[0])
    assert len([line for line in told if line.startswith("==")]) == 5
