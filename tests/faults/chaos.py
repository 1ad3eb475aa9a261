"""`make chaos`: every fault in every phase, against standing federations; writes chaos.json.

usage: python -m tests.faults.chaos [--seed N] [--repeats 3] [--federations 2] [--cell FAULT/PHASE] [--out chaos.json]

A scenario follows from its seed, fault and phase alone: `--cell "cut/uploading" --seed 62` repeats the one of that line of
chaos.json.
"""

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.faults.scenarios import Scenario, cells, impossible, matrix, scenario
from tests.faults.trial import Trials, good


class Campaign:
    """Scenarios dealt to federations that run beside each other."""

    def __init__(self, scenarios: Iterator[Scenario], out: Path) -> None:
        self.records: list[dict[str, Any]] = []
        self._scenarios = scenarios
        self._out = out
        self._turn = threading.Lock()
        self._known: dict[Any, str] = {}
        self._trials: list[Trials] = []

    def run(self, federations: int) -> None:
        """Run them all."""
        with ThreadPoolExecutor(federations) as pool:
            for work in [pool.submit(self._work) for _ in range(federations)]:
                work.result()

    def _work(self) -> None:
        trials = Trials(self._known)
        self._trials.append(trials)
        try:
            while (one := self._next()) is not None:
                self._keep(trials.run(one))
        finally:
            trials.close()

    def give_up(self, *_: object) -> None:
        """Leave no process and no file behind."""
        for trials in self._trials:
            trials.close()
        os._exit(1)  # threads are in the middle of something

    def _next(self) -> Scenario | None:
        with self._turn:
            return next(self._scenarios, None)

    def _keep(self, record: dict[str, Any]) -> None:
        with self._turn:
            self.records.append(record)
            print("good" if good(record) else "BAD ", json.dumps(record), flush=True)
            self._out.write_text(json.dumps(self.records, indent=1) + "\n")


def table(records: list[dict[str, Any]]) -> str:
    """The matrix as Markdown: in each cell how many scenarios ended in which way."""
    phases = list(dict.fromkeys(phase for _, phase in cells()))
    lines = [f"| fault | {' | '.join(phases)} |", "|---" * (len(phases) + 1) + "|"]
    for fault in dict.fromkeys(fault for fault, _ in cells()):
        row = [fault]
        for phase in phases:
            of_cell = [r for r in records if (r["fault"], r["phase"]) == (fault, phase)]
            ways = Counter(r["outcome"] if good(r) else "BAD" for r in of_cell)
            row.append(", ".join(f"{n} {way}" for way, n in sorted(ways.items(), reverse=True)) or "-")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the scenarios; 1 if one of them is not as it must be, or a cell of the matrix is empty."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--federations", type=int, default=2)
    parser.add_argument("--cell", action="append", default=[])
    parser.add_argument("--out", type=Path, default=Path("chaos.json"))
    asked = parser.parse_args()
    if asked.cell:
        wanted = [tuple(cell.split("/", 1)) for cell in asked.cell]
        scenarios = iter([scenario(asked.seed + n, *cell) for cell in wanted for n in range(asked.repeats)])
    else:
        wanted = list(cells())
        scenarios = matrix(asked.seed, asked.repeats)
        for cell in wanted:
            if reason := impossible(*cell):
                print(f"can't be tried here: {'/'.join(cell)}: {reason}")
    print(f"seed {asked.seed}", flush=True)
    began = time.monotonic()
    campaign = Campaign(scenarios, asked.out)
    signal.signal(signal.SIGTERM, campaign.give_up)
    signal.signal(signal.SIGINT, campaign.give_up)
    campaign.run(asked.federations)
    records = campaign.records
    print(table(records))
    bad = [record for record in records if not good(record)]
    empty = set(wanted) - {(record["fault"], record["phase"]) for record in records}
    for record in bad:
        print(f"BAD  {json.dumps(record)}")
    for cell in sorted(empty):
        print(f"EMPTY {'/'.join(cell)}")
    minutes = (time.monotonic() - began) / 60
    print(
        f"{len(records) - len(bad)} of {len(records)} as they must be, {minutes:.1f} min, seed {asked.seed}"
    )
    return 1 if bad or empty else 0


if __name__ == "__main__":
    sys.exit(main())
