"""Drives one run of the round machine without sockets: every command is performed at once, in site order.

Coordinator's commands go through `fedserver.compute_work` and the coordinator's compute functions, sites'
commands through the agents' compute functions; only what carries them (gRPC, pipes, processes, the journal)
is not there. What a site raises becomes the event that production makes of it; an exception that is none of
ours is a bug of a strategy or a plug-in and ends the simulation with its traceback.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from fedcore.artifact_store import ArtifactStore
from fedcore.clock import SystemClock
from fedcore.compute_host import ComputeHost, Progress
from fedcore.data.benchmark_sets import Federation
from fedcore.data.partition import class_counts
from fedcore.device import ComputeDevice
from fedcore.errors import FedimpresError, InternalError, PlanError
from fedcore.models import learns_from_images
from fedcore.models.state_file import load_tensors, save_state
from fedcore.plan import Plan
from fedcore.round_record import RoundRecord
from fedcore.seeding import derive_seed
from fedcore.tensor_file import read_manifest
from fedserver import round_events as ev
from fedserver.compute import ServerCompute
from fedserver.compute_work import ComputeCommand, ComputeWork
from fedserver.recalibration import Recalibrate
from fedserver.round_decisions import Presence, World, decide
from fedserver.round_machine import apply
from fedserver.round_state import RunState, Stage, held_for_late
from fedserver.round_work import Evaluate, Synthesise, Train, work
from fedserver.strategies import load_strategy
from fedsim.attacks import Attack, attacked
from fedsim.forgetting import ForgettingMeter
from fedsim.identity import initial_model_path
from fedsim.sites import MemoryImages, QuietJob, SimulatedSites, joined, plan_images

OnRound = Callable[[RoundRecord, Path], None]
T = TypeVar("T")


class ScratchStore(ArtifactStore):
    """Artifacts that need not survive a power cut: a simulation starts again from its seed."""

    def adopt(self, path: Path, digest: str, *, durable: bool = True) -> Path:
        """Move a whole file into the store under its digest, without fsync. Raises StorageError."""
        return super().adopt(path, digest, durable=False)


class InProcessHost(ComputeHost):
    """The coordinator's compute commands, performed here and now instead of in a process of their own."""

    def __init__(self, compute: ServerCompute) -> None:
        super().__init__("fedserver.compute")
        self._handlers = compute.handlers()

    async def run(
        self, command: str, args: Mapping[str, Any], on_progress: Progress | None = None
    ) -> dict[str, Any]:
        """Perform a command; never waits for anything. Raises the FedimpresError of its handler."""
        return self._handlers[command](dict(args), QuietJob())


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run that is over. `forgetting` is by round; `models` and `impressions` are files by round."""

    state: RunState
    events: tuple[ev.Event, ...]
    forgetting: Mapping[int, float | None]
    models: Mapping[int, Path]
    impressions: Mapping[int, Path]


class Simulation:
    """One run. `perform` runs it to its end."""

    def __init__(
        self,
        plan: Plan,
        federation: Federation,
        *,
        device: ComputeDevice,
        device_option: str,
        folder: Path,
        forgetting_rounds: int,
        on_round: OnRound | None,
        check_impressions: bool,
        attacks: Mapping[str, Attack] | None = None,
        late_sites: Collection[str] = (),
    ) -> None:
        """`folder` takes artifacts and sites' state; it must be empty. Raises DataError, PlanError."""
        self._plan = plan
        self._device = device
        self._check_impressions = check_impressions
        self._attacks = attacks or {}
        self._late_sites = frozenset(late_sites)
        if self._attacks and plan.transfer.updates != "lossless":
            raise PlanError("plan: transfer.updates must be 'lossless' where sites attack")
        self._compute = {"device": device_option, "threads": device.threads}
        self._folder = folder
        self._on_round = on_round
        self._first_measured = plan.rounds - forgetting_rounds + 1
        self._images = MemoryImages(federation, plan)
        self._agents = SimulatedSites(self._images)
        self._clock = SystemClock()
        self._store = ScratchStore(folder / "artifacts")
        self._work = ComputeWork(InProcessHost(ServerCompute()), self._store, self._clock, self._compute)
        self._site_names = check_sites(plan, federation)
        self._initial = self._adopt_initial()
        validation = joined([federation.sites[site].validation for site in self._site_names])
        self._meter = ForgettingMeter(
            plan, plan_images(validation, plan, federation.class_names, "pooled validation"), device
        )
        self._state = RunState(run=plan.name, plan=plan)
        self._events: list[ev.Event] = []
        self._forgetting: dict[int, float | None] = {}
        # What each site has fetched and still keeps, to count the bytes that production would send.
        self._held: dict[str, set[str]] = {site: set() for site in self._site_names}
        self._bytes_down = 0

    def perform(self) -> Outcome:
        """Run to the end; failures of the run are its final state. Raises what is no FedimpresError."""
        synthesises = load_strategy(self._plan).synthesis is not None
        self._happen(ev.RunStarted(at=self._clock.wall(), sites=self._site_names, synthesises=synthesises))
        while True:
            while events := decide(self._state, self._world()):
                for event in events:
                    self._happen(event)
            if self._state.status.final:
                return self._outcome()
            commands = work(self._state)
            if not commands:
                raise InternalError(f"simulation: nothing to do in {self._state.status}, {self._state.stage}")
            began = time.monotonic()
            for command in commands:
                if isinstance(command, Train):
                    self._train(command)
                elif isinstance(command, Recalibrate):
                    self._recalibrate(command)
                elif isinstance(command, Evaluate):
                    self._evaluate(command)
                else:
                    self._coordinate(command, began)

    # -- events ---------------------------------------------------------------------------------

    def _happen(self, event: ev.Event) -> None:
        self._state = apply(self._state, event)
        self._events.append(event)
        match event:
            case ev.RoundOpened():
                self._bytes_down = 0
            case ev.CollectionClosed():
                if event.round >= self._first_measured:
                    self._forgetting[event.round] = self._meter.close()
            case ev.RoundFinished():
                record = self._state.records[-1].record()
                if self._on_round is not None:
                    self._on_round(record, self._store.find(record.model))
                self._discard()

    def _discard(self) -> None:
        """Delete what no later round and no result needs: disk use does not grow with sites x rounds."""
        best = self._state.best
        state = self._state
        keep = {state.model, state.released, state.strategy_state, best.model if best is not None else None}
        keep |= {record.impressions_digest for record in state.records}
        keep |= held_for_late(state, first_model=True)
        keep |= {record.model for record in state.records[-2:]}
        for digest in list(self._store.digests()):
            if digest not in keep:
                self._store.delete(digest)

    def _world(self) -> World:
        """Everybody is here, and no time passes that could decide anything."""
        return World(
            now=0.0,
            wall=self._clock.wall(),
            stage_since=0.0,
            sites={
                site: Presence(
                    connected=True,
                    unable="",
                    since=0.0,
                    last_progress=0.0,
                    num_examples=len(self._images[site].train),
                )
                for site in self._site_names
            },
            bytes_down=self._bytes_down,
        )

    def _outcome(self) -> Outcome:
        records = self._state.records
        return Outcome(
            state=self._state,
            events=tuple(self._events),
            forgetting=dict(self._forgetting),
            models={r.round: self._store.path(r.model) for r in records if r.model in self._store},
            impressions={
                r.round: self._store.path(r.impressions_digest) for r in records if r.impressions_digest
            },
        )

    # -- commands -------------------------------------------------------------------------------

    def _train(self, command: Train) -> None:
        site, number, current = command.site, command.round, self._state.current
        in_time = current is not None and current.number == number and self._state.stage is Stage.TRAINING
        if in_time:
            assert current is not None
            if site in current.slow:  # it delivers when the round has closed
                return
            self._happen(ev.TaskStarted(at=self._clock.wall(), round=number, site=site))
            if site in self._late_sites:
                at = self._clock.wall()
                self._happen(ev.SiteLetGo(at=at, round=number, site=site, reason="late", slow=True))
                return
        needed = [digest for digest in (command.model, command.impressions, command.strategy_state) if digest]
        self._fetch(site, needed)
        self._held[site] = set(needed)
        model, out = self._store.find(command.model), self._store.new_path()
        common = self._common(site)
        try:
            result = self._agents.train(
                {
                    **common,
                    "round": number,
                    "model": str(model),
                    "impressions": str(self._store.find(command.impressions))
                    if command.impressions
                    else None,
                    "strategy_state": str(self._store.find(command.strategy_state))
                    if command.strategy_state
                    else None,
                    "objective": self._state.objective,
                    "objective_options": json.loads(self._state.objective_options_json),
                    "local_tensors": list(self._state.local_tensors),
                    "personal_tensors": list(self._state.personal_tensors),
                    "check_impressions": self._check_impressions,
                    "out": str(out),
                },
                QuietJob(),
            )
            digest, report = str(result["digest"]), ev.Report.model_validate(result["report"])
            if site in self._attacks:
                digest = self._attack(site, number, model, out)
            update = self._store.adopt(out, digest)
            if in_time and number >= self._first_measured:
                self._measure(site, number, model, update)
        except FedimpresError as error:
            out.unlink(missing_ok=True)
            at = self._clock.wall()
            self._happen(ev.SiteLetGo(at=at, round=number, site=site, reason=str(error)[:2000]))
            return
        self._happen(
            ev.UpdateStored(
                at=self._clock.wall(),
                round=number,
                site=site,
                digest=digest,
                payload_bytes=self._payload_bytes(digest),
                report=report,
            )
        )

    def _recalibrate(self, command: Recalibrate) -> None:
        site, number = command.site, command.round
        self._fetch(site, [command.model])
        out = self._store.new_path()
        try:
            result = self._agents.recalibrate(
                {
                    **self._common(site),
                    "round": number,
                    "model": str(self._store.find(command.model)),
                    "local_tensors": list(self._state.local_tensors),
                    "out": str(out),
                },
                QuietJob(),
            )
            digest = str(result["digest"])
            self._store.adopt(out, digest)
        except FedimpresError as error:
            out.unlink(missing_ok=True)
            at = self._clock.wall()
            self._happen(ev.StatisticsLetGo(at=at, round=number, site=site, reason=str(error)[:2000]))
            return
        at, num_examples = self._clock.wall(), int(result["num_examples"])
        self._happen(
            ev.StatisticsStored(at=at, round=number, site=site, digest=digest, num_examples=num_examples)
        )

    def _evaluate(self, command: Evaluate) -> None:
        site, number = command.site, command.round
        self._fetch(site, [command.model])
        try:
            result = self._agents.evaluate(
                {
                    **self._common(site),
                    "model": str(self._store.find(command.model)),
                    "local_tensors": list(self._state.local_tensors),
                    "personal_tensors": list(self._state.personal_tensors),
                    # The simulated sites share one public test set: their histograms are no secret.
                    "share_class_metrics": True,
                },
                QuietJob(),
            )
        except FedimpresError as error:
            at = self._clock.wall()
            self._happen(ev.EvaluationLetGo(at=at, round=number, site=site, reason=str(error)[:2000]))
            return
        metrics = tuple(ev.Metrics.model_validate(split) for split in result["splits"])
        self._happen(ev.EvaluationReported(at=self._clock.wall(), round=number, site=site, metrics=metrics))

    def _coordinate(self, command: ComputeCommand, began: float) -> None:
        waited = time.monotonic() - began
        event = _now(self._work.perform(self._state, command, self._initial, lambda fields: None))
        if isinstance(command, Synthesise):
            # Production synthesises beside the sites' work; here it had to wait for them.
            event = event.model_copy(update={"at": event.at - waited})
        self._happen(event)

    def _attack(self, site: str, number: int, start: Path, update: Path) -> str:
        """Put what a bad site sends in the place of its update; returns its digest."""
        seed = derive_seed(self._plan.seed, "attack", number, site)
        generator = torch.Generator().manual_seed(seed)
        tensors = attacked(self._attacks[site], load_tensors(start), load_tensors(update), generator)
        other = self._store.new_path()  # the tensors may still lie in a map of the update's file
        digest = save_state(other, tensors)
        other.replace(update)
        return digest

    def _measure(self, site: str, number: int, start: Path, update: Path) -> None:
        if not learns_from_images(self._plan.model.name):
            return
        counts = class_counts(self._images[site].train.labels, self._plan.model.classes)
        self._meter.measure(
            site, number, counts, start=start, update=update,
            own_tensors=(*self._state.local_tensors, *self._state.personal_tensors),
            state=self._site_folder(site),
        )  # fmt: skip

    def _common(self, site: str) -> dict[str, Any]:
        return {
            "data": {"site": site},
            "compute": self._compute,
            "plan": self._plan.to_json(),
            "site": site,
            "run": self._state.run,
            "state": str(self._site_folder(site)),
        }

    def _site_folder(self, site: str) -> Path:
        return self._folder / "sites" / site

    def _fetch(self, site: str, digests: list[str]) -> None:
        for digest in digests:
            if digest not in self._held[site]:
                self._held[site].add(digest)
                self._bytes_down += self._payload_bytes(digest)

    def _payload_bytes(self, digest: str) -> int:
        return read_manifest(self._store.find(digest))[0].payload_bytes

    def _adopt_initial(self) -> str | None:
        """Copy the plan's initial model into the store. Raises PlanError."""
        if self._plan.training.initial is None:
            return None
        path = initial_model_path(self._plan)
        copy = self._store.new_path()
        shutil.copyfile(path, copy)
        digest = hashlib.sha256(copy.read_bytes()).hexdigest()
        self._store.adopt(copy, digest)
        return digest


def replay(plan: Plan, events: tuple[ev.Event, ...]) -> RunState:
    """The state that a simulation's events lead to, as the coordinator's recovery computes it."""
    state = RunState(run=plan.name, plan=plan)
    for event in events:
        state = apply(state, event)
    return state


def check_sites(plan: Plan, federation: Federation) -> tuple[str, ...]:
    """The sites of a run: those that the plan names, else all. Raises PlanError if they don't fit."""
    there = tuple(sorted(federation.sites))
    sites = plan.sites if plan.sites is not None else there
    unknown = [site for site in sites if site not in federation.sites]
    if unknown:
        raise PlanError(
            f"plan: sites: '{unknown[0]}' is not in the federation, there are: {', '.join(there)}"
        )
    if len(sites) < plan.min_sites:
        raise PlanError(f"plan: min_sites is {plan.min_sites}, the federation has {len(sites)} sites")
    if learns_from_images(plan.model.name) and plan.model.classes < len(federation.class_names):
        raise PlanError(
            f"plan: model.classes is {plan.model.classes}, "
            f"{federation.dataset} has {len(federation.class_names)} classes"
        )
    return sites


def _now(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing:

    no event loop, so it also works inside one (notebooks).
    """
    try:
        coroutine.send(None)
    except StopIteration as done:
        value: T = done.value
        return value
    coroutine.close()
    raise InternalError("simulation: a compute command waited for something")
