"""`make chaos`: the whole matrix against one standing federation; writes chaos.json.

usage: python -m tests.faults.chaos [--repeats 3] [--seed N] [--only "FAULT/PHASE"] [--out chaos.json]
"""

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults import fault_plan
from tests.faults.chaos_federation import SITES, ChaosFederation, build, impressions_document, upload_document
from tests.faults.outcome import References, accepted, counted_twice, final_model, leaks
from tests.faults.phases import held_in
from tests.faults.scenarios import FAULTS, Scenario, impossible, matrix
from tests.faults.strikes import Strike


class Chaos:
    """One standing federation and what its fault-free runs gave."""

    def __init__(self, federation: ChaosFederation) -> None:
        self.federation = federation
        self.references = References(federation)
        everybody = (SITES, SITES)
        for document in (upload_document(), impressions_document()):
            self.references.digest(document, everybody)
        self._usual: Counter[str] = federation.held_resources()

    def run(self, scenario: Scenario) -> dict[str, Any]:
        """One scenario, as chaos.json tells it. The federation is whole and idle afterwards."""
        federation = self.federation
        record: dict[str, Any] = {"seed": scenario.seed, "fault": scenario.fault, "phase": scenario.phase}
        began = time.monotonic()
        run = ""
        try:
            run = self._under_faults(scenario)
            ended = federation.wait(run, timeout_s=90)
            record["outcome"] = ended.state
            record["reason"] = ended.reason
        except Exception as error:
            traceback.print_exc()
            record["outcome"] = f"broken: {error}"[:600]
        try:
            self._restore()
            record |= self._judge(scenario, run)
        except Exception as error:
            traceback.print_exc()
            record["outcome"] = f"{record['outcome']}; broken: {error}"[:600]
        record["good"] = (
            record["outcome"] == scenario.outcome
            and record.get("digest_equal") is True
            and record.get("counted_twice") == []
            and record.get("leaks") == []
        )
        record["seconds"] = round(time.monotonic() - began, 1)
        return record

    def _under_faults(self, scenario: Scenario) -> str:
        (fault,) = scenario.plan  # one after the other would be a phase of its own
        after = fault.after_chunk if isinstance(fault, fault_plan.Cut) else 2
        strike = None
        try:
            with held_in(self.federation, scenario.document, fault.phase, fault.round, after) as run:
                strike = Strike(self.federation, fault, run)
                strike.strike()
            strike.mend()
            self.federation.wait(run, timeout_s=90)
        finally:
            if strike is not None:
                strike.end()
        return run

    def _judge(self, scenario: Scenario, run: str) -> dict[str, Any]:
        participants = accepted(self.federation, run)
        return {
            "participants": [list(sites) for sites in participants],
            "digest_equal": final_model(self.federation, run)
            == self.references.digest({**scenario.document, "limits": {"join_wait_s": 60}}, participants),
            "counted_twice": counted_twice(self.federation, run),
            "leaks": leaks(self.federation, self._usual),
        }

    def _restore(self) -> None:
        federation = self.federation
        for relay in federation.relays.values():
            relay.heal()
        for name in ("coordinator", *SITES):
            program = federation.programs.get(name)
            if program is None or program.poll() is not None:
                federation.programs.pop(name, None)
                federation.start_coordinator() if name == "coordinator" else federation.start_agent(name)
        federation.abort_all()
        federation.wait_connected(*SITES)


def main() -> int:
    """Run the scenarios; 1 if one of them is not as it must be."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path("chaos.json"))
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    for fault in FAULTS:
        for phase in fault_plan.PHASES:
            if reason := impossible(fault, phase):
                print(f"impossible: {fault} / {phase}: {reason}")
    records = []
    with tempfile.TemporaryDirectory() as folder:
        federation = build(Path(folder))
        try:
            chaos = Chaos(federation)
            for scenario in matrix(asked.seed, asked.repeats):
                if asked.only and asked.only not in f"{scenario.fault}/{scenario.phase}":
                    continue
                records.append(chaos.run(scenario))
                print(json.dumps(records[-1]), flush=True)
                asked.out.write_text(json.dumps(records, indent=1))
        finally:
            federation.stop()
        federation.check_over()
    bad = [record for record in records if not record["good"]]
    print(f"{len(records) - len(bad)} of {len(records)} scenarios are as they must be (seed {asked.seed})")
    return 1 if bad or not records else 0


if __name__ == "__main__":
    sys.exit(main())
