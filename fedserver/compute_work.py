"""Performs the round machine's compute commands: from a command to the event that says how it ended.

Every result is a durable artifact before its event exists. A compute process that dies is started again and the command
repeated a few times; recomputing gives the same bytes.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog
from pydantic import ValidationError

from fedcore.artifact_store import ArtifactStore
from fedcore.clock import Clock
from fedcore.compute_host import ComputeHost, Progress
from fedcore.errors import ComputeError, DiskError, FedimpresError, OverloadedError
from fedcore.plan import Plan, describe_problems
from fedcore.plan_forecast import Sizes
from fedserver import round_events as ev
from fedserver.directives import initialised_event
from fedserver.forecast import Measure
from fedserver.recalibration import PoolStatistics
from fedserver.round_state import RunState
from fedserver.round_work import Aggregate, EvaluateHere, Initialise, LateArrival, ScoreUpdates, Synthesise
from fedserver.threads import in_pool

ATTEMPTS = 3
_MEASURE_WAIT_S = 45.0
_MEASURED = 32
log = structlog.get_logger(__name__)

ComputeCommand = Initialise | Aggregate | PoolStatistics | Synthesise | EvaluateHere | ScoreUpdates


class ComputeWork:
    """Compute commands of the coordinator, each answered with one event."""

    def __init__(
        self,
        host: ComputeHost,
        store: ArtifactStore,
        clock: Clock,
        compute: dict[str, Any],
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        """`compute` is the configuration section of that name, as an object. Without a `pool` in which the disk is
        waited for there need be no event loop: a simulation talks to nobody meanwhile.
        """
        self._host = host
        self._store = store
        self._clock = clock
        self._compute = compute
        self._pool = pool
        self._measured: dict[str, Measure] = {}
        # What was stored here and may not be journalled yet, by digest, and for which run: its state does not speak for it.
        self.unrecorded: dict[str, str] = {}

    async def perform(
        self, state: RunState, command: ComputeCommand, initial: str | None, on_progress: Progress
    ) -> ev.Event:
        """Do a command; failures become events.

        Raises DiskError, beside cancellation: the command is as good as not begun.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await self._attempt(state, command, initial, on_progress)
            except ValidationError as error:
                return self.failed(command, f"the compute process answered {describe_problems(error)}")
            except ComputeError as error:
                log.warning(
                    "compute command failed", run=state.run, command=type(command).__name__, error=str(error)
                )
                if attempt == ATTEMPTS:
                    return self.failed(command, error.message)
            except DiskError:
                raise
            except FedimpresError as error:
                return self.failed(command, error.message)
        raise AssertionError("unreachable")

    async def _attempt(
        self, state: RunState, command: ComputeCommand, initial: str | None, on_progress: Progress
    ) -> ev.Event:
        out = self._store.new_path()
        plan = state.plan.to_json()
        try:
            match command:
                case Initialise():
                    path = str(self._store.find(initial)) if initial else None
                    result = await self._run("initialise", on_progress, plan=plan, initial=path, out=str(out))
                    await self._adopt(state.run, out, result["digest"])
                    return initialised_event(result, self._clock.wall())
                case Aggregate():
                    return await self._aggregate(state, command, plan, out, on_progress)
                case PoolStatistics():
                    return await self._pool_statistics(state, command, plan, out, on_progress)
                case Synthesise():
                    result = await self._run(
                        "synthesise", on_progress, plan=plan, round=command.round,
                        model=str(self._store.find(command.model)), previous=self._path(command.previous), out=str(out),
                        last_model=self._path(command.last_model),
                        validation_accuracy=_newest_validation(state),
                    )  # fmt: skip
                    if result["digest"] is not None:
                        await self._adopt(state.run, out, result["digest"])
                    return ev.SynthesisFinished(
                        at=self._clock.wall(),
                        round=command.round,
                        impressions=result["digest"],
                        made=result["made"],
                        note=result["note"],
                        figures=result["figures"],
                        previous=command.previous,
                    )
                case EvaluateHere():
                    result = await self._run(
                        "evaluate", on_progress, plan=plan,
                        model=str(self._store.find(command.model)), data=state.plan.evaluation.data,
                    )  # fmt: skip
                    metrics = tuple(ev.Metrics.model_validate(split) for split in result["splits"])
                    return ev.EvaluationReported(
                        at=self._clock.wall(), round=command.round, site="", metrics=metrics
                    )
                case ScoreUpdates():
                    return await self._score_updates(
                        command, plan, state.plan.evaluation.updates_data, on_progress
                    )
        finally:
            out.unlink(missing_ok=True)

    async def _aggregate(
        self, state: RunState, command: Aggregate, plan: str, out: Path, on_progress: Progress
    ) -> ev.Event:
        if missing := {site: "missing" for site, digest, _ in command.updates if digest not in self._store}:
            return self._lost(command, missing)
        updates = [
            {
                "site": site,
                "path": str(self._store.path(digest)),
                "digest": digest,
                "report": report.model_dump(),
            }
            for site, digest, report in command.updates
        ]
        state_out, released_out = self._store.new_path(), self._store.new_path()
        try:
            result = await self._run(
                "aggregate", on_progress, plan=plan, round=command.round, num_sites=len(state.sites),
                model=str(self._store.find(command.model)), updates=updates, out=str(out),
                state=self._path(command.strategy_state), state_out=str(state_out),
                released=self._path(command.released), released_out=str(released_out),
                registered_examples=dict(command.registered_examples),
                late=[self._late(late) for late in command.late],
            )  # fmt: skip
            if result["damaged"]:
                return self._lost(command, dict.fromkeys(result["damaged"], "damaged"))
            if result["digest"] is None:
                return ev.AggregationFailed(
                    at=self._clock.wall(),
                    round=command.round,
                    reason=result["reason"],
                    rejected=result["rejected"],
                    verdicts=result["verdicts"],
                )
            await self._adopt(state.run, out, result["digest"])
            if result["state_digest"] is not None:
                await self._adopt(state.run, state_out, result["state_digest"])
            if result["released_digest"] is not None:
                await self._adopt(state.run, released_out, result["released_digest"])
        finally:
            state_out.unlink(missing_ok=True)
            released_out.unlink(missing_ok=True)
        return ev.AggregationFinished(
            at=self._clock.wall(),
            round=command.round,
            model=result["digest"],
            accepted=tuple(result["accepted"]),
            rejected=result["rejected"],
            released=result["released_digest"],
            strategy_state=result["state_digest"],
            verdicts=result["verdicts"],
            merge=result["merge"],
            folded=result["folded"],
        )

    async def _pool_statistics(
        self, state: RunState, command: PoolStatistics, plan: str, out: Path, on_progress: Progress
    ) -> ev.Event:
        measured = [
            {
                "site": site,
                "path": str(self._store.path(digest)),
                "digest": digest,
                "report": report.model_dump(),
            }
            for site, digest, report in command.statistics
        ]
        model = {"path": str(self._store.path(command.model)), "digest": command.model}
        result = await self._run(
            "pool_statistics", on_progress, plan=plan, round=command.round, model=model, statistics=measured,
            out=str(out),
        )  # fmt: skip
        if result["damaged"]:
            lost = {
                site: f"{site} round {command.round}: its statistics are missing or damaged on the coordinator's disk"
                for site in result["damaged"]
            }
            log.error("stored statistics are lost", run=state.run, round=command.round, lost=sorted(lost))
            return ev.StatisticsLost(at=self._clock.wall(), round=command.round, lost=lost)
        await self._adopt(state.run, out, result["digest"])
        return ev.ModelRecalibrated(
            at=self._clock.wall(), round=command.round, model=result["digest"], rejected=result["rejected"]
        )

    async def _adopt(self, run: str, path: Path, digest: str) -> None:
        """Store what the compute process wrote."""
        self.unrecorded[digest] = run
        if self._pool is None:
            self._store.adopt(path, digest)
        else:
            await in_pool(self._pool, self._store.adopt, path, digest)

    def _lost(self, command: Aggregate, how: dict[str, str]) -> ev.Event:
        """The aggregation that failed because stored updates are gone: their sites are asked again."""
        reasons = {
            site: f"{site} round {command.round}: its update is {what} on the coordinator's disk"
            for site, what in how.items()
        }
        log.error("stored updates are lost", round=command.round, lost=how)
        reason = "; ".join(reasons.values())
        return ev.AggregationFailed(
            at=self._clock.wall(), round=command.round, reason=reason, rejected=reasons
        )

    async def _score_updates(
        self, command: ScoreUpdates, plan: str, data: str | None, on_progress: Progress
    ) -> ev.Event:
        updates = [{"site": site, "path": str(self._store.find(digest))} for site, digest in command.updates]
        model = str(self._store.find(command.model))
        result = await self._run(
            "score_updates", on_progress, plan=plan, model=model, updates=updates, data=data
        )
        return ev.UpdatesScored.model_validate({**result, "at": self._clock.wall(), "round": command.round})

    def _late(self, late: LateArrival) -> dict[str, Any]:
        return {
            "site": late.site,
            "round": late.round,
            "path": str(self._store.find(late.digest)),
            "model": str(self._store.find(late.model)),
            "report": late.report.model_dump(),
            "registered_examples": late.registered_examples,
        }

    def _path(self, digest: str | None) -> str | None:
        return str(self._store.find(digest)) if digest is not None else None

    async def _run(self, command: str, on_progress: Progress, **args: Any) -> dict[str, Any]:
        return await self._host.run(command, {"compute": self._compute, **args}, on_progress)

    async def measure(self, plan: Plan) -> Measure:
        """How large a plan's artifacts are; what was found before is remembered.

        Raises PlanError for a plan that can't be built, OverloadedError if the compute process is busy for long,
        ComputeError if it dies.
        """
        key = plan.model_dump_json(include={"model", "strategy", "strategy_options", "transfer", "synthesis"})
        if key not in self._measured:
            try:
                async with asyncio.timeout(_MEASURE_WAIT_S):
                    found = await self._run("measure", lambda _: None, plan=plan.to_json())
            except TimeoutError as error:
                raise OverloadedError(
                    f"the compute process has been busy with '{self._host.busy_with}' for {_MEASURE_WAIT_S:g} s",
                    hint="ask again between two rounds; sizes that were found once are remembered",
                ) from error
            while len(self._measured) >= _MEASURED:
                del self._measured[next(iter(self._measured))]
            self._measured[key] = Measure(**{**found, "sizes": Sizes.model_validate(found["sizes"])})
        return self._measured[key]

    def failed(self, command: ComputeCommand, reason: str) -> ev.Event:
        """The event that says that a command came to nothing."""
        at = self._clock.wall()
        match command:
            case Initialise():
                return ev.RunFinished(at=at, status="FAILED", reason=f"no first model: {reason}")
            case Aggregate():
                return ev.AggregationFailed(at=at, round=command.round, reason=reason, rejected={})
            case PoolStatistics():
                return ev.RecalibrationSkipped(
                    at=at, round=command.round, reason=f"statistics not pooled: {reason}"
                )
            case Synthesise():
                note = f"no impressions this round: {reason}"
                return ev.SynthesisFinished(at=at, round=command.round, impressions=None, made=0, note=note)
            case EvaluateHere():
                return ev.EvaluationLetGo(at=at, round=command.round, site="", reason=reason)
            case ScoreUpdates():
                return ev.UpdatesScored(at=at, round=command.round, note=f"updates not scored: {reason}")


def _newest_validation(state: RunState) -> float | None:
    """Validated accuracy of the newest finished round that has one."""
    known = (record.validation_accuracy for record in reversed(state.records))
    return next((accuracy for accuracy in known if accuracy is not None), None)
