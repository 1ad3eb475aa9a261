"""Carries faults out: `strike` while the run is held in a phase, `mend` once it goes on."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedagent.noop import train_noop
from fedagent.trainer import TrainRequest
from fedcore.artifact_store import artifact_path
from fedcore.compute_worker import Job
from fedcore.errors import ConflictError, FedimpresError, TransferError
from fedcore.plan import plan_from_json
from fedserver.config import ServerHome
from fedserver.journal_end import JournalEnd
from tests.faults import fault_plan as faults
from tests.faults.chaos_federation import COMPILER, ChaosFederation
from tests.faults.phases import LAST
from tests.faults.raw_site import RawSite
from tests.faults.torn_wal import tear
from tests.federation_fixture import gone, wait_until


class Strike:
    """One fault in one run."""

    def __init__(self, federation: ChaosFederation, fault: faults.Fault, run: str) -> None:
        self._federation = federation
        self._fault = fault
        self._run = run
        # Waits for what must be seen before the fault is taken back, while the run goes on.
        self._symptom: Callable[[], object] = lambda: None
        # Takes it back when that was seen, and at the end of the run.
        self._mending, self._at_the_end = ExitStack(), ExitStack()

    def strike(self) -> None:
        """Do it. The run is held in the fault's phase."""
        match self._fault:
            case faults.Kill():
                self._kill(self._fault)
            case faults.Cut():
                relay = self._federation.relays[self._fault.site]
                relay.half_open() if self._fault.half_open else relay.cut()
            case faults.Partition():
                self._partition(self._fault)
            case faults.SlowLink():
                relay = self._federation.relays[self._fault.site]
                relay.slow(self._fault.bytes_per_s, self._fault.delay_s)
                self._at_the_end.callback(relay.heal)
            case faults.DiskFull():
                self._fill(self._fault)
            case faults.TornJournal():
                self._tear(self._fault)
            case faults.FlippedBit():
                self._flip(self._fault)
            case faults.Duplicate():
                self._duplicate(self._fault)
            case faults.Reorder():
                self._reorder(self._fault)
            case faults.ClockJump():
                self._federation.set_clock(self._fault.who, self._fault.seconds)
                time.sleep(1)  # for whoever looks at the clock from time to time
                self._at_the_end.callback(self._federation.set_clock, self._fault.who, 0)

    def mend(self) -> None:
        """Wait until the run has met the fault, then take it back. The run goes on meanwhile."""
        try:
            self._symptom()
        finally:
            self._mending.close()

    def end(self) -> None:
        """The run is over: everything as it was."""
        self._mending.close()
        self._at_the_end.close()

    # -- the faults -----------------------------------------------------------------------------

    def _kill(self, fault: faults.Kill) -> None:
        federation = self._federation
        if fault.who == "compute":
            pid = federation.compute_pid("coordinator")
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: gone(pid), "the compute process is gone")
            return
        if fault.for_good:
            federation.kill_with_compute(fault.who)
            self._at_the_end.callback(federation.wait_connected, fault.who)
            self._at_the_end.callback(federation.start_agent, fault.who)
            return
        if fault.power and COMPILER is not None:
            federation.cut_power(fault.who)
        else:
            federation.kill(fault.who)
        federation.start_coordinator() if fault.who == "coordinator" else federation.start_agent(fault.who)

    def _partition(self, fault: faults.Partition) -> None:
        relay = self._federation.relays[fault.site]
        relay.silence()
        self._mending.callback(relay.heal)
        if fault.seconds is not None:
            # The phase may hold the same line: what it held comes through when the partition ends.
            time.sleep(fault.seconds)
            return
        self._symptom = lambda: self._wait_event("site_let_go")

    def _fill(self, fault: faults.DiskFull) -> None:
        federation, site = self._federation, faults.VICTIM
        log_of = LAST if fault.phase == "waiting" else site
        since = {name: federation.log_size(name) for name in (log_of, "coordinator")}
        self._mending.enter_context(federation.file_limit(fault.who, fault.limit_bytes))
        if fault.who == "compute":
            self._symptom = lambda: self._wait_log("coordinator", since, "result can't be stored")
        elif fault.who == f"{site} compute" or (fault.who == site and fault.round == 1):
            self._symptom = lambda: self._wait_event("site_let_go")
        elif fault.who == site:
            self._symptom = lambda: self._wait_event("evaluation_let_go")
        elif fault.phase == "between rounds":
            try:
                federation.control("ResumeRun", self._run)
            except FedimpresError as error:
                assert error.code == "storage", error
            else:
                raise AssertionError("resumed without a journal")
            self._mending.close()
        else:
            told = ('"code": "disk"', '"code": "storage"')
            self._symptom = lambda: self._wait_log(log_of, since, *told)

    def _wait_event(self, kind: str) -> None:
        wait_until(lambda: kind in self._federation.journal(self._run), kind)

    def _wait_log(self, name: str, since: dict[str, int], *texts: str) -> None:
        def said() -> bool:
            return any(text in self._federation.log(name, since[name]) for text in texts)

        wait_until(said, f"{name} says {' or '.join(texts)}")

    def _tear(self, fault: faults.TornJournal) -> None:
        federation = self._federation
        federation.kill("coordinator")
        home = ServerHome(federation.server_home)
        lost = tear(home.database, fault.records, JournalEnd(home.journal_end).noted())
        since = federation.log_size("coordinator")
        federation.start_coordinator()
        said = federation.log("coordinator", since)
        assert "has lost its last records" in said, f"{lost} records were lost, and nobody noticed"
        if federation.run(self._run).state == "PAUSED" and fault.phase != "between rounds":
            # What an operator asked for can't be found out again from the sites: they see it, and ask again.
            federation.control("ResumeRun", self._run)

    def _flip(self, fault: faults.FlippedBit) -> None:
        federation, home = self._federation, self._federation.site_home(fault.site)
        match fault.what:
            case "update":
                _flip_bit(self._stored_update(fault.site, fault.round))
            case "statistics":
                digest = federation.measured(self._run, fault.round)[LAST]
                _flip_bit(artifact_path(federation.server_home / "artifacts", digest))
            case "spool":
                part = federation.part(fault.site)
                assert part is not None
                federation.kill("coordinator")
                _flip_bit(part)
                federation.start_coordinator()
            case "model" | "partial":
                federation.kill(fault.site)
                pattern = "artifacts/partial/*" if fault.what == "partial" else "artifacts/??/*.safetensors"
                for path in home.glob(pattern):
                    _flip_bit(path)
                federation.start_agent(fault.site)

    def _duplicate(self, fault: faults.Duplicate) -> None:
        raw = RawSite(self._federation, fault.site)
        round_number, update = self._deliverable(fault)
        outcomes = [raw.deliver(self._run, round_number, update) for _ in range(2)]
        expected = "TOO_LATE" if fault.phase in ("waiting", "between rounds") else "STORED"
        assert all(expected in str(outcome) or "TOO_LATE" in str(outcome) for outcome in outcomes), outcomes

    def _reorder(self, fault: faults.Reorder) -> None:
        raw = RawSite(self._federation, fault.site)
        round_number, update = self._deliverable(fault)
        refused = raw.deliver(self._run, round_number, update, backwards=True)
        early = fault.phase in ("training", "uploading") or (fault.phase == "fetching" and fault.round == 1)
        if early:
            assert isinstance(refused, TransferError | ConflictError), refused
        else:
            assert "STORED" in str(refused) or "TOO_LATE" in str(refused), refused
        raw.deliver(self._run, round_number, update)

    def _deliverable(self, fault: Any) -> tuple[int, Path]:
        """An update that the victim made, makes, or might have made."""
        if fault.phase in ("waiting", "between rounds"):
            return fault.round - 1, self._model(fault.round)
        if fault.site in self._federation.stored(self._run, fault.round):
            return fault.round, self._stored_update(fault.site, fault.round)
        return fault.round, self._made(fault.site, fault.round)

    def _model(self, round_number: int) -> Path:
        """The file of the model that a round starts from."""
        if round_number == 1:
            digest = self._federation.events(self._run, "run_initialised")[0]["model"]
        else:
            digest = self._federation.events(self._run, "aggregation_finished")[round_number - 2]["model"]
        return artifact_path(self._federation.server_home / "artifacts", digest)

    def _stored_update(self, site: str, round_number: int) -> Path:
        stored = self._federation.events(self._run, "update_stored")
        digest = next(e["digest"] for e in stored if (e["site"], e["round"]) == (site, round_number))
        return artifact_path(self._federation.server_home / "artifacts", digest)

    def _made(self, site: str, round_number: int) -> Path:
        """The update that the site makes of this round's model."""
        (plan,) = self._federation.submitted(self._run)
        out = self._federation.root / "made.safetensors"
        request = TrainRequest(
            plan=plan_from_json(plan, "plan"), site=site, run=self._run, round=round_number,
            model=self._model(round_number), impressions=None, objective="", objective_options={}, local_tensors=(),
            state=self._federation.root, out=out,
        )  # fmt: skip
        made = train_noop(request, Job(0, lambda message: None))
        return out.rename(out.with_name(f"{made.digest}.safetensors"))


def _flip_bit(path: Path) -> None:
    """Well behind a file's header, in the exponent of a float32: a mean of three would lose one of the last bits."""
    at = path.stat().st_size * 3 // 4 // 4 * 4 + 3
    with path.open("r+b", buffering=0) as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x20]))
