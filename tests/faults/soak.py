"""`make soak`: run after run under random faults against one standing federation, and what its processes hold meanwhile.

usage: python -m tests.faults.soak [--minutes 30] [--seed N] [--out soak.json] [--plot FOLDER]

In the first part the coordinator and both of its processes live while agents and lines fail; in the second its compute
process is killed, in the third all of it. Two agents live from beginning to end. A line is fitted to each process that
lived for a third of the time or longer (`growth`); exit 1 unless all are flat and every run ended DONE or DEGRADED.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedcore.errors import FedimpresError
from fedctl.documents import FINAL_STATES
from tests.faults import soak_federation as faults
from tests.faults.chaos_federation import SITES
from tests.faults.growth import growth
from tests.faults.soak_federation import SoakFederation, build, draw_plan, first_plans
from tests.faults.soak_plot import plot
from tests.faults.soak_samples import MEASURES, Life, Sampler
from tests.federation_fixture import wait_until

SAMPLE_S = 5.0
FAULT_GAP_S = 20.0
JUDGED_SHARE = 1 / 3
# A rise over the whole time that is below this counts as none: MB, descriptors, threads.
FLOORS = {"rss_mb": 0.0, "descriptors": 1.0, "threads": 1.0}
# No run takes so long, whatever befalls it.
RUN_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Part:
    """A share of the soak and what may go wrong in it."""

    name: str
    share: float
    faults: tuple[faults.Fault, ...]


# A process that is started again takes seconds of a processor, a line that is cut next to none.
_LINES = (
    faults.cut, faults.cut, faults.cut_amid_bytes, faults.partition, faults.kill_agent, faults.kill_agent_compute,
)  # fmt: skip
PARTS = (
    Part("agents and lines fail", 0.4, _LINES),
    Part("and the coordinator's compute process", 0.25, (*_LINES, *(faults.kill_coordinator_compute,) * 2)),
    Part(
        "and the coordinator, with and without its compute process",
        0.35,
        (*_LINES, *(faults.kill_coordinator,) * 3),
    ),
)


@dataclass
class Soak:
    """Drives runs and faults, one thing at a time: only the sampler works beside it."""

    federation: SoakFederation
    sampler: Sampler
    draw: random.Random
    minutes: float
    faults: list[tuple[float, str]] = field(default_factory=list)
    # State, rounds and seconds of each round, by run.
    runs: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[tuple[float, float]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def go(self) -> None:
        """Until the time is over; the last run is waited for."""
        self._next_fault_s = self._gap()
        # What each kind of run takes at first is no growth.
        for plan in first_plans(self.draw):
            self._one_run(plan)
        while self.sampler.now_s() < 60 * self.minutes:
            self._one_run(draw_plan(self.draw))

    def _one_run(self, plan: dict[str, Any]) -> None:
        began = self.sampler.now_s()
        run = self.federation.submit(plan)
        state = "SUBMITTED"
        while state not in FINAL_STATES and self.sampler.now_s() < began + RUN_TIMEOUT_S:
            if self.sampler.now_s() >= self._next_fault_s:
                self._strike()
            time.sleep(0.2)
            try:
                state = self.federation.run(run).state
            except FedimpresError as error:
                self.broken.append(f"run {run} could not be asked for: {error}")
        if state not in ("DONE", "DEGRADED"):
            self.broken.append(f"run {run} is {state} after {self.sampler.now_s() - began:.0f} s")
            self.federation.abort_all()
        records = self.federation.rounds(run)
        self.rounds += [(round(began, 1), record["seconds"]) for record in records]
        self.runs.append({"run": run, "plan": plan["name"], "state": state, "rounds": len(records)})
        print(f"{began:6.0f} s  {run}  {plan['name']:9}  {state:8}  {len(records)} rounds", flush=True)

    def _strike(self) -> None:
        fault = self.draw.choice(self._part().faults)
        at = self.sampler.now_s()
        self.faults.append((round(at, 1), fault(self.federation, self.draw)))
        self._next_fault_s = self.sampler.now_s() + self._gap()

    def _part(self) -> Part:
        gone_by = self.sampler.now_s() / (60 * self.minutes)
        for part in PARTS:
            if gone_by < part.share:
                return part
            gone_by -= part.share
        return PARTS[-1]

    def _gap(self) -> float:
        return self.draw.expovariate(1 / FAULT_GAP_S)


def judge(lives: list[Life], seconds: float) -> list[dict[str, Any]]:
    """One row for each measure of each process that lived long enough."""
    rows = []
    for life in lives:
        if not life.times_s or life.seconds < JUDGED_SHARE * seconds:
            continue
        for measure in MEASURES:
            line = growth(life.times_s, getattr(life, measure), floor=FLOORS[measure])
            if line is not None:
                figures = {key: round(value, 3) for key, value in asdict(line).items()}
                more = {
                    "total": round(line.total, 3),
                    "hidden": round(line.hidden, 3),
                    "verdict": line.verdict,
                    "flat": line.flat,
                }
                rows.append({"process": life.role, "pid": life.pid, "measure": measure, **figures, **more})
    return rows


def report(soak: Soak, seed: int, left: list[str]) -> dict[str, Any]:
    """What soak.json holds."""
    sampler = soak.sampler
    seconds = [taken for _, taken in soak.rounds]
    lives = sorted(sampler.lives.values(), key=lambda life: (life.role, life.times_s[:1]))
    growths = judge(lives, 60 * soak.minutes)
    return {
        "seed": seed,
        "minutes": soak.minutes,
        "runs": len(soak.runs),
        "rounds": sum(run["rounds"] for run in soak.runs),
        "states": dict(Counter(run["state"] for run in soak.runs)),
        "faults": dict(Counter(fault for _, fault in soak.faults)),
        "round_s": {"median": statistics.median(seconds), "max": max(seconds)},
        "disk_mb": {"begin": sampler.disk[0], "end": sampler.disk[-1]},
        "growth": growths,
        "left": left,
        "broken": soak.broken,
        "flat": bool(growths) and all(row["flat"] for row in growths),
        "series": {
            "lives": [asdict(life) for life in lives],
            "disk": sampler.disk,
            "faults": soak.faults,
            "rounds": soak.rounds,
            "runs": soak.runs,
        },
    }


def left_over(federation: SoakFederation) -> list[str]:
    """Files and processes that an idle federation has no use for, after a moment's patience."""
    try:
        wait_until(lambda: not (federation.left_files() or federation.strays()), "nothing left", timeout_s=20)
    except AssertionError:
        return [*federation.left_files(), *federation.strays()]
    return []


def main() -> int:
    """Soak; 1 if something grows, is left over, or went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    parser.add_argument(
        "--plot", type=Path, default=None, help="folder for soak.svg and soak.png; beside --out"
    )
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="fedimpres-soak-") as folder:
        federation = build(Path(folder))
        sampler = Sampler(federation, SAMPLE_S)
        soak = Soak(federation, sampler, random.Random(asked.seed), asked.minutes)
        try:
            soak.go()
            federation.wait_connected(*SITES)
            left = left_over(federation)
        except BaseException:
            traceback.print_exc()
            _show_logs(federation)
            raise
        finally:
            federation.stop()
            sampler.close()
        federation.check_over()
    found = report(soak, asked.seed, left)
    asked.out.write_text(json.dumps(found) + "\n")
    plot(found, asked.plot or asked.out.parent)
    say(found)
    return 0 if found["flat"] and not left and not soak.broken else 1


def _show_logs(federation: SoakFederation) -> None:
    for name in ("coordinator", *SITES):
        print(f"--- {name}", federation.log(name)[-3000:], file=sys.stderr, sep="\n")


def say(found: dict[str, Any]) -> None:
    """The figures, for people."""
    for row in found["growth"]:
        print(
            f"{row['process']:20} {row['measure']:11} mean {row['mean']:8.1f}  slope {row['slope_per_hour']:+8.2f}"
            f" ± {row['within_per_hour']:.2f} an hour (95 %): {row['total']:+.2f} in {row['seconds'] / 60:.0f} min,"
            f" at most {row['hidden']:.2f}: {row['verdict']}"
        )
    print(f"left over: {found['left'] or 'nothing'}; broken: {found['broken'] or 'nothing'}")
    print(
        f"{found['runs']} runs {found['states']}, {found['rounds']} rounds, {sum(found['faults'].values())} faults:"
        f" {'flat' if found['flat'] else 'NOT FLAT'} (seed {found['seed']})"
    )


if __name__ == "__main__":
    sys.exit(main())
