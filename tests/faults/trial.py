"""One scenario against a standing federation: held in a phase, struck, ended, judged; the federation is whole afterwards."""

import shutil
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults import fault_plan
from tests.faults.chaos_federation import SITES, ChaosFederation, build, impressions_document, upload_document
from tests.faults.outcome import References, accepted, counted_twice, leaks, lost, models
from tests.faults.phases import held_in
from tests.faults.scenarios import Scenario
from tests.faults.strikes import Strike

# Longer than any run takes that ends at all, on a machine that has much else to do.
_END_S = 300.0
# What a federation's home may need; fsync on a tmpfs costs nothing, on a busy disk most of a scenario's time.
_ROOM_BYTES = 2 << 30


class Trials:
    """A standing federation, and what its runs gave that nobody disturbed. Close it.

    `known` may be shared by several: what undisturbed runs give depends on the plan and on who takes part alone.
    """

    def __init__(self, known: dict[Any, str], mutant: str = "", end_s: float = _END_S) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="chaos-", dir=_place())
        self._mutant = mutant
        self._known = known
        self._end_s = end_s
        self._usual: Counter[str] = Counter()
        # Caches that libraries make once.
        self._usual_files: set[str] = set()
        self.federation: ChaosFederation | None = None

    def stand(self) -> ChaosFederation:
        """The federation, built and warmed up if there is none."""
        if self.federation is None:
            root = Path(tempfile.mkdtemp(dir=self._folder.name))
            self.federation = build(root, self._mutant)
            everybody = (SITES, SITES)
            for document in (upload_document(), impressions_document()):
                found = References(self.federation).digest(document, everybody)
                known = self._known.setdefault((document["name"], everybody), found)
                assert found == known, f"{document['name']}: two undisturbed runs gave {found} and {known}"
            self._usual = self.federation.held_resources()
            self._usual_files = set(self.federation.left_files())
        return self.federation

    def run(self, scenario: Scenario) -> dict[str, Any]:
        """One scenario, as chaos.json tells it."""
        record: dict[str, Any] = {"seed": scenario.seed, "fault": scenario.fault, "phase": scenario.phase}
        began = time.monotonic()
        run = ""
        record |= {
            "outcome": "broken",
            "expected": scenario.outcome,
            "participants": [],
            "digest_equal": False,
        }
        record |= {"counted_twice": [], "lost": [], "leaks": []}
        try:
            federation = self.stand()
            since = {name: federation.log_size(name) for name in SITES}
            try:
                run = self._under_faults(federation, scenario)
                record["outcome"] = federation.wait(run, timeout_s=self._end_s).state
            finally:
                self._restore(federation)
            record |= self._judge(federation, scenario, run, since)
        except Exception as error:
            traceback.print_exc()
            record["broken"] = f"{type(error).__name__}: {error}"[:600]
            self._rebuild_next_time()
        record["seconds"] = round(time.monotonic() - began, 1)
        return record

    def close(self) -> None:
        """End all processes and delete the homes. Raises AssertionError if a process is left."""
        try:
            if self.federation is not None:
                self.federation.stop()
                self.federation.check_over()
        finally:
            self._folder.cleanup()

    def _under_faults(self, federation: ChaosFederation, scenario: Scenario) -> str:
        (fault,) = scenario.plan  # one after the other would be a phase of its own
        after = fault.after_chunk if isinstance(fault, fault_plan.Cut) else 2
        twice = isinstance(fault, fault_plan.Duplicate)
        strike = None
        try:
            with held_in(federation, scenario.document, fault.phase, fault.round, after, twice) as run:
                strike = Strike(federation, fault, run)
                strike.strike()
            strike.mend()
            federation.wait(run, timeout_s=self._end_s)
        finally:
            if strike is not None:
                strike.end()
        return run

    def _judge(
        self, federation: ChaosFederation, scenario: Scenario, run: str, since: dict[str, int]
    ) -> dict[str, Any]:
        participants = accepted(federation, run)
        references = References(federation, self._known)
        return {
            "participants": [list(sites) for sites in participants],
            "digest_equal": models(federation, run) == references.digest(scenario.document, participants),
            "counted_twice": counted_twice(federation, run),
            "lost": [] if scenario.loses else lost(federation, run, since),
            "leaks": leaks(federation, run, self._usual, self._usual_files),
        }

    def _restore(self, federation: ChaosFederation) -> None:
        for relay in federation.relays.values():
            relay.heal()
        for name in ("coordinator", *SITES):
            program = federation.programs.get(name)
            if program is None or program.poll() is not None:
                federation.programs.pop(name, None)
                federation.start_coordinator() if name == "coordinator" else federation.start_agent(name)
        federation.abort_all()
        federation.wait_connected(*SITES)

    def _rebuild_next_time(self) -> None:
        """A federation that something unforeseen happened to is judged by nothing; its logs stay to be read."""
        if self.federation is not None:
            federation, self.federation = self.federation, None
            federation.stop()
            kept = Path(tempfile.mkdtemp(prefix="chaos-broken-"))
            for log in federation.root.glob("*.log"):
                shutil.copy(log, kept)
            print(f"the logs of this federation are kept in {kept}", flush=True)


def good(record: dict[str, Any]) -> bool:
    """Whether a scenario went as it must."""
    return (
        record["outcome"] == record["expected"]
        and record["digest_equal"] is True
        and not (record["counted_twice"] or record["lost"] or record["leaks"] or "broken" in record)
    )


def _place() -> str | None:
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > _ROOM_BYTES else None
