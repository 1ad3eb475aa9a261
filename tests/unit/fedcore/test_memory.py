"""What goes back to the system."""

import subprocess
import sys

import pytest

# Every hundredth of the blocks stays, so that the heap can't shrink from its end.
HOLES = """
import os
from pathlib import Path
from fedcore.memory import give_back_freed, use_one_malloc_arena

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

use_one_malloc_arena()
blocks = [bytes(20_000) for _ in range(5000)]
kept = blocks[::100]
del blocks
before = resident_mb()
give_back_freed()
print(before - resident_mb())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_pages_between_what_stays_go_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, timeout=60
    )
    assert float(done.stdout) > 50, "of the 100 MB that were taken"
