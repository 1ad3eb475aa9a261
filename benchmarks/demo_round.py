"""How much longer a round of the demo takes because of impressions: one JSON object on stdout.

`fedctl demo` runs again and again, in turn with `fedimpres` and with `fedlc`, which is the same without impressions (a
test holds that): real coordinator, real agents, mutual TLS. A demo's figure is the median duration of the rounds in which
sites train on impressions, and of the same rounds without; the first rounds have none yet. A round pays for three things:
making impressions beside the training, sending them, and the larger batches of sites that train on them. Durations are
those of the round records.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STRATEGIES = ("fedlc", "fedimpres")
# The exit status of a run that went on without a site in some round.
DEGRADED = 8


def main() -> None:
    """Run the benchmark as the command line asks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    pairs = []
    for seed in range(asked.repeats):
        rounds = {name: demo(name, asked.dataset, asked.data, seed) for name in STRATEGIES}
        pairs.append(compared(rounds["fedlc"], rounds["fedimpres"]))
        print(pairs[-1], file=sys.stderr, flush=True)
    row = {
        "benchmark": "demo_round",
        "dataset": asked.dataset,
        "repeats": pairs,
        "longer": round(statistics.median(pair["longer"] for pair in pairs), 3),
        "machine": platform.machine(),
    }
    print(json.dumps(row))


def demo(strategy: str, dataset: str, data: Path | None, seed: int) -> list[dict[str, Any]]:
    """The round records of one demo."""
    with tempfile.TemporaryDirectory(prefix="demo-round-") as folder:
        fedctl = str(Path(sys.executable).with_name("fedctl"))
        command = [fedctl, "demo", "--dataset", dataset, "--strategy", strategy]
        command += ["--seed", str(seed), "--out", folder]
        if data is not None:
            command += ["--data", str(data)]
        ended = subprocess.run(command, check=False, capture_output=True, text=True)
        if ended.returncode not in (0, DEGRADED):
            raise SystemExit(f"{' '.join(command)}: exit {ended.returncode}: {ended.stderr[-2000:]}")
        return [json.loads(line) for line in (Path(folder) / "rounds.jsonl").read_text().splitlines()]


def compared(without: list[dict[str, Any]], having: list[dict[str, Any]]) -> dict[str, Any]:
    """Median seconds of the rounds that train on impressions, without and with them."""
    numbers = {record["round"] for record in having if any(record["impressions"]["used"].values())}
    seconds = [
        statistics.median(record["seconds"] for record in records if record["round"] in numbers)
        for records in (without, having)
    ]
    return {
        "rounds": len(numbers),
        "without_s": round(seconds[0], 3),
        "with_s": round(seconds[1], 3),
        "longer": round(seconds[1] / seconds[0] - 1, 3),
    }


if __name__ == "__main__":
    main()
