"""The limit of descriptors follows the number of agents. In processes of their own: a limit can't be raised again."""

import resource
import subprocess
import sys

import pytest

PROGRAM = """
import resource
from fedserver.descriptors import allow_descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
print(allow_descriptors({agents}))
"""


def said(soft: int, hard: int, agents: int) -> str:
    program = PROGRAM.format(soft=soft, hard=hard, agents=agents)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 2000, reason="a hard limit below 2000")
def test_the_limit_is_raised_to_what_the_agents_need() -> None:
    assert said(100, 2000, 1000) == "1256\n"
    assert said(1500, 2000, 1000) == "1500\n", "never lowered"


def test_a_limit_that_is_too_low_is_told() -> None:
    lines = said(100, 300, 1000)
    assert lines.endswith("300\n")
    assert "too few descriptors" in lines
    assert "LimitNOFILE" in lines
