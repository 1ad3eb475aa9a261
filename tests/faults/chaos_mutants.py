"""`make chaos-mutants`: the suite against a product whose guards are broken one at a time; writes mutants.json.

usage: python -m tests.faults.chaos_mutants [--only NAME] [--federations 2] [--out mutants.json]

Each mutant meets the few cells that should see it. One that none of them sees has survived: exit code 1.
"""

import argparse
import json
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.faults import fault_plan as faults
from tests.faults.fault_plan import Phase
from tests.faults.mutants import MUTANTS
from tests.faults.scenarios import Scenario, scenario
from tests.faults.trial import Trials, good

# A run ends within a few seconds, or a mutant keeps it from that.
_END_S = 60.0

Wanted = Callable[[Any], bool]


def _any(fault: Any) -> bool:
    return True


def _power(fault: Any) -> bool:
    return isinstance(fault, faults.Kill) and fault.power


def _plain_kill(fault: Any) -> bool:
    return isinstance(fault, faults.Kill) and not fault.power and not fault.for_good


def _forward_at_the_coordinator(fault: Any) -> bool:
    return isinstance(fault, faults.ClockJump) and fault.who == "coordinator" and fault.seconds > 0


def _gone_for_good(fault: Any) -> bool:
    return isinstance(fault, faults.Kill) and fault.for_good


def _of_statistics(fault: Any) -> bool:
    return isinstance(fault, faults.FlippedBit) and fault.what == "statistics"


# The cells that should see a mutant, and which of their scenarios.
CELLS: Mapping[str, tuple[tuple[str, Phase, Wanted], ...]] = {
    "no fsync": (("kill coordinator", "aggregating", _power), ("kill coordinator", "training", _power)),
    "no digest check at receipt": (("flipped bit", "uploading", _any),),
    "stored updates are not hashed again": (("flipped bit", "aggregating", _any),),
    "an update counts as often as it comes": (("duplicate", "training", _any),),
    "no look at the round of a late update": (("duplicate", "between rounds", _any),),
    "a lost tail of the journal goes unnoticed": (("torn journal", "training", _any),),
    "confirmed before it is in the journal": (
        ("kill coordinator", "aggregating", _plain_kill),
        ("kill coordinator", "uploading", _plain_kill),
    ),
    "summed by order of arrival": (("reorder", "synthesising", _any), ("kill agent", "synthesising", _any)),
    "sites are not asked again": (("kill agent", "training", _plain_kill),),
    "a part of an upload counts as the whole": (("cut", "uploading", _any),),
    "an agent trusts what it has cached": (("flipped bit", "training", _any),),
    "a full disk at the coordinator fails the site": (("disk full", "uploading", _any),),
    "deadlines by the wall clock": (("clock jump", "uploading", _forward_at_the_coordinator),),
    "stored statistics are not hashed again": (("flipped bit", "recalibrating", _of_statistics),),
    "a site's last update is not noted for good": (("kill agent", "recalibrating", _power),),
    "the spool is never swept": (("kill agent", "uploading", _gone_for_good),),
}


def drawn(fault: str, phase: Phase, wanted: Wanted) -> Scenario:
    """The first scenario of a cell that is one of those wanted."""
    scenarios = (scenario(seed, fault, phase) for seed in range(1000))
    return next(one for one in scenarios if all(map(wanted, one.plan)))


def why_bad(record: Mapping[str, Any]) -> list[str]:
    """What the suite has against a scenario, in words."""
    found = [str(record[key]) for key in ("broken",) if key in record]
    if record["outcome"] != record["expected"]:
        found.append(f"{record['outcome']}, expected {record['expected']}")
    if "broken" not in record and record["digest_equal"] is not True:
        found.append("another model than that of an undisturbed run")
    return [*found, *(f"{key}: {one}" for key in ("counted_twice", "lost", "leaks") for one in record[key])]


def examine(mutant: str) -> dict[str, Any]:
    """Run a mutant against its cells until one of them sees it. One that keeps a federation from starting proves nothing:
    that is an error.
    """
    trials = Trials({}, mutant, _END_S)
    told: dict[str, Any] = {"mutant": mutant, "caught": False, "by": [], "passed": []}
    began = time.monotonic()
    try:
        trials.stand()
        for cell in CELLS[mutant]:
            one = drawn(*cell)
            record = trials.run(one)
            where = {"fault": one.fault, "phase": one.phase, "seed": one.seed}
            if good(record):
                told["passed"].append(where)
                continue
            told["caught"] = True
            told["by"].append({**where, "because": why_bad(record)})
            break
    except Exception as error:
        traceback.print_exc()
        told["error"] = f"{type(error).__name__}: {error}"[:600]
    finally:
        trials.close()
    return {**told, "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    """Examine the mutants; 1 if one survives or could not be examined."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--federations", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("mutants.json"))
    asked = parser.parse_args()
    assert CELLS.keys() == MUTANTS.keys(), "each mutant has cells that should see it"
    turn, told = threading.Lock(), []

    def examined(mutant: str) -> None:
        found = examine(mutant)
        with turn:
            told.append(found)
            word = "ERROR   " if "error" in found else "caught  " if found["caught"] else "SURVIVED"
            print(word, json.dumps(found), flush=True)
            asked.out.write_text(json.dumps(told, indent=1) + "\n")

    with ThreadPoolExecutor(asked.federations) as pool:
        for work in [pool.submit(examined, name) for name in MUTANTS if asked.only in name]:
            work.result()
    seen = [one["mutant"] for one in told if one["caught"]]
    unseen = [one["mutant"] for one in told if not one["caught"]]
    print(f"{len(seen)} of {len(told)} broken guards were seen; not seen: {unseen or 'none'}")
    return 1 if unseen or not told else 0


if __name__ == "__main__":
    random.seed(0)
    sys.exit(main())
