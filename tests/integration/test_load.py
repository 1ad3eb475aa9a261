"""The load benchmark in small: it must not rot."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
AGENTS = 8


def test_a_few_light_agents_run_rounds_and_the_json_has_what_is_promised(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "benchmarks/load.py",
        "--agents",
        str(AGENTS),
        "--rounds",
        "2",
        "--ping-s",
        "0.2",
    ]
    command += ["--processes", "1", "--home", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert (found["agents"], found["rounds"], found["lost"], found["sockets"]) == (AGENTS, 2, 0, AGENTS)
    assert found["delivered"] == 3 * AGENTS, (
        "two rounds, and the one whose impressions were made beside the pings"
    )
    times = ("round_s", "control_p99_ms", "bare_p99_ms", "ping_p99_ms")
    for name in (*times, "rss_mb", "bytes_per_idle_agent"):
        assert found[name] > 0, name
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"
