"""Performs the tasks that the coordinator asks for: fetch, train, deliver; or fetch, measure or evaluate, report."""

import asyncio
import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from fedagent.agent_machine import is_run
from fedagent.audit import Purpose, SiteAudit
from fedagent.config import AgentConfig, AgentHome
from fedagent.held_impressions import HeldImpressions
from fedagent.policy import SitePolicy, refusal_of_task
from fedagent.recalibration_limit import RecalibrationLimit
from fedagent.site_model import ScoredModel, remember
from fedagent.transfer import Transfers, load_record, save_record
from fedcore.artifact_store import ArtifactStore
from fedcore.compute_host import ComputeHost
from fedcore.errors import (
    DigestMismatchError,
    FedimpresError,
    PermissionDeniedError,
    ProtocolError,
    StorageError,
    code_of,
)
from fedcore.impression_check import ImpressionCheck
from fedcore.memory import give_back_freed
from fedcore.parsing import parse_json
from fedcore.tensor_file import TensorManifest, read_manifest
from fedcore.tensor_stream import manifest_to_proto
from fedcore.text import wire_text
from fedcore.v1 import federation_pb2

Send = Callable[[federation_pb2.AgentMessage], None]
_TRAIN_ATTEMPTS = 2
log = structlog.get_logger(__name__)


class Tasks:
    """Turns one directive into work and its result, unless the site's policy forbids it.

    `send` queues a message for the coordinator.
    """

    def __init__(
        self,
        site: str,
        home: AgentHome,
        config: AgentConfig,
        compute: ComputeHost,
        store: ArtifactStore,
        transfers: Transfers,
        send: Send,
        policy: SitePolicy | None = None,
        *,
        audit: SiteAudit,
    ) -> None:
        self._site = site
        self._policy = policy or SitePolicy()
        self._home = home
        self._data = config.data.model_dump(mode="json")
        self._compute_config = config.compute.model_dump(mode="json")
        self._share_class_metrics = config.policy.share_class_metrics
        self._check_impressions = config.privacy.check_impressions
        self._compute = compute
        self._store = store
        self._transfers = transfers
        self._send = send
        self._audit = audit
        self._limit = RecalibrationLimit(home.local_state)
        self._held = HeldImpressions(home.artifacts)
        self._told_held: list[str] = []
        self._present_run = ""
        home.tasks.mkdir(parents=True, exist_ok=True)
        home.local_state.mkdir(parents=True, exist_ok=True)

    async def describe(self) -> federation_pb2.Capabilities:
        """What this site can do now; a failure becomes `unavailable_reason`."""
        args = {"data": self._data, "compute": self._compute_config}
        try:
            found = await self._compute.run("describe", args)
        except FedimpresError as error:
            log.error("this site can take no work", code=error.code, error=str(error))
            return federation_pb2.Capabilities(unavailable_reason=wire_text(str(error), 1000))
        return federation_pb2.Capabilities(
            models=found["models"],
            objectives=found["objectives"],
            datasets=found["datasets"],
            device=found["device"],
            device_name=found["device_name"],
            threads=found["threads"],
            class_names=found["class_names"] or (),
            num_examples=found["num_examples"],
        )

    async def train(self, task: federation_pb2.TrainTask) -> None:
        """Train and deliver. Whatever goes wrong is told to the coordinator."""
        try:
            self._check_allowed(
                task.plan_json, objective=task.objective, has_impressions=task.HasField("impressions")
            )
            self._forget_other_runs(task.run)
            self._forget_rounds(task.run, task.round, inputs_of(task))
            for attempt in range(1, _TRAIN_ATTEMPTS + 1):
                try:
                    return await self._train_and_deliver(task)
                except (
                    DigestMismatchError,
                    StorageError,
                ) as error:  # the update on our disk is damaged: make it again
                    self._drop(task)
                    if attempt == _TRAIN_ATTEMPTS:
                        raise
                    log.warning(
                        "update was damaged, training again",
                        run=task.run,
                        code=error.code,
                        error=error.message,
                    )
        except (FedimpresError, OSError) as error:
            self._drop(task)
            self._failed(task.run, task.round, error)

    async def recalibrate(self, task: federation_pb2.RecalibrateTask) -> None:
        """Report BatchNorm statistics of the merged model, measured once. Whatever goes wrong is told to the coordinator."""
        try:
            self._check_allowed(task.plan_json, recalibrates=True)
            report = await self._given_before(task)
            if report is None:
                report = await self._measure(task)
                await asyncio.to_thread(self._limit.answered, report)
        except (FedimpresError, OSError) as error:
            self._failed(task.run, task.round, error, recalibrating=True)
            return
        self._send(federation_pb2.AgentMessage(statistics=report))

    async def _given_before(
        self, task: federation_pb2.RecalibrateTask
    ) -> federation_pb2.StatisticsReport | None:
        """The answer, if this is a repetition. Raises PermissionDeniedError, recorded, for what may not be asked."""
        try:
            return await asyncio.to_thread(self._limit.answer, task.run, task.round, task.model.digest)
        except PermissionDeniedError as error:
            with contextlib.suppress(FedimpresError):  # a log that can't be written changes no answer
                await self._audit.statistics_refused(task, error)
            raise

    async def _measure(self, task: federation_pb2.RecalibrateTask) -> federation_pb2.StatisticsReport:
        out = self._store.new_path()
        try:
            model = await self._model_of(task)
            result = await self._compute_within_hours(
                "recalibrate",
                {
                    **self._common(task.plan_json, task.run),
                    "round": task.round,
                    "model": str(model),
                    "local_tensors": list(task.local_tensors),
                    "out": str(out),
                },
                self._forward(task.run, task.round),
            )
            manifest, payload = await asyncio.to_thread(_read_tensors, out)
        finally:
            out.unlink(missing_ok=True)
        return federation_pb2.StatisticsReport(
            run=task.run,
            round=task.round,
            model=task.model.digest,
            num_examples=result["num_examples"],
            manifest=manifest_to_proto(manifest, result["digest"]),
            payload=payload,
            seconds=result["seconds"],
        )

    async def evaluate(self, task: federation_pb2.EvaluateTask) -> None:
        """Evaluate and report. Whatever goes wrong is told to the coordinator."""
        try:
            self._check_allowed(task.plan_json)
            model = await self._model_of(task)
            result = await self._compute_within_hours(
                "evaluate",
                {
                    **self._common(task.plan_json, task.run),
                    "model": str(model),
                    "local_tensors": list(task.local_tensors),
                    "personal_tensors": list(task.personal_tensors),
                    "share_class_metrics": self._share_class_metrics,
                },
                self._forward(task.run, task.round),
            )
            await asyncio.to_thread(self._remember, task, result["splits"])
        except (FedimpresError, OSError) as error:
            self._failed(task.run, task.round, error, evaluating=True)
            return
        report = federation_pb2.EvaluationReport(
            run=task.run,
            round=task.round,
            splits=[federation_pb2.SplitMetrics(**split) for split in result["splits"]],
            seconds=result["seconds"],
        )
        self._send(federation_pb2.AgentMessage(evaluation=report))

    def _remember(self, task: federation_pb2.EvaluateTask, splits: list[dict[str, Any]]) -> None:
        """Keep what the site's own people need to use the model that was scored."""
        scored = ScoredModel(
            site=self._site,
            run=task.run,
            round=task.round,
            digest=task.model.digest,
            plan_json=task.plan_json,
            own_tensors=(*task.local_tensors, *task.personal_tensors),
            splits=tuple(splits),
        )
        try:
            remember(self._home.local_state / task.run, scored)
        except OSError as error:
            # The federation gets its figures all the same.
            log.warning("the model scored can't be exported here", run=task.run, error=str(error))

    async def _model_of(self, task: federation_pb2.RecalibrateTask | federation_pb2.EvaluateTask) -> Path:
        """The merged model of a task that follows an update."""
        self._forget_other_runs(task.run)
        self._forget_rounds(task.run, task.round + 1, task.model.digest)
        return await self._transfers.fetch(
            task.model,
            self._reporter(task.run, task.round, "fetching"),
            Purpose("model", task.run, task.round),
        )

    async def _train_and_deliver(self, task: federation_pb2.TrainTask) -> None:
        record_path = self._record_path(task.run, task.round)
        record = load_record(record_path)
        inputs = inputs_of(task)
        # Made from other inputs: of a round that a restored coordinator asks for again.
        if record is None or record.get("inputs") != inputs or record["digest"] not in self._store:
            record = {**await self._train(task), "inputs": inputs}
            save_record(record_path, record)
        await asyncio.to_thread(self._limit.update_leaves, task.run, task.round, inputs)
        digest = record["digest"]
        key = federation_pb2.DeliveryKey(run=task.run, round=task.round, site=self._site, digest=digest)
        outcome = await self._transfers.deliver(
            key,
            self._store.path(digest),
            record["report"],
            self._reporter(task.run, task.round, "delivering"),
        )
        name = federation_pb2.DeliverReply.Outcome.Name(outcome)
        log.info("update delivered", run=task.run, round=task.round, outcome=name)
        self._drop(task)

    async def _train(self, task: federation_pb2.TrainTask) -> dict[str, Any]:
        moved = self._reporter(task.run, task.round, "fetching")
        needed = {task.model.digest}
        model = await self._transfers.fetch(task.model, moved, Purpose("model", task.run, task.round))
        impressions = None
        if task.HasField("impressions"):
            needed.add(task.impressions.digest)
            purpose = Purpose("impressions", task.run, task.round)
            impressions = str(await self._transfers.fetch(task.impressions, moved, purpose))
        strategy_state = None
        if task.HasField("strategy_state"):
            needed.add(task.strategy_state.digest)
            purpose = Purpose("strategy state", task.run, task.round)
            strategy_state = str(await self._transfers.fetch(task.strategy_state, moved, purpose))
        self._transfers.forget_all_but(needed)
        await self._tell_held()
        out = self._store.new_path()
        try:
            result = await self._compute_within_hours(
                "train",
                {
                    **self._common(task.plan_json, task.run),
                    "round": task.round,
                    "model": str(model),
                    "impressions": impressions,
                    "strategy_state": strategy_state,
                    "objective": task.objective,
                    "objective_options": _json_object(task.objective_options_json),
                    "local_tensors": list(task.local_tensors),
                    "personal_tensors": list(task.personal_tensors),
                    "check_impressions": self._check_impressions,
                    "out": str(out),
                },
                self._forward(task.run, task.round),
            )
            self._store.adopt(out, result["digest"], durable=False)
            _log_check(task.run, task.round, result["report"].get("impression_check"))
        finally:
            out.unlink(missing_ok=True)
        return result

    async def _tell_held(self) -> None:
        """Tell the coordinator which banks lie here, if that has changed."""
        held = await asyncio.to_thread(self._held.digests)
        if held != self._told_held:
            self._told_held = held
            message = federation_pb2.ImpressionsHeld(digests=held)
            self._send(federation_pb2.AgentMessage(impressions_held=message))

    def _check_allowed(
        self,
        plan_json: str,
        *,
        objective: str | None = None,
        has_impressions: bool = False,
        recalibrates: bool = False,
    ) -> None:
        """Raise PermissionDeniedError with the reason if this site's policy forbids a task."""
        reason = refusal_of_task(
            self._policy,
            plan_json,
            objective=objective,
            has_impressions=has_impressions,
            recalibrates=recalibrates,
        )
        if reason:
            raise PermissionDeniedError(reason)

    async def _compute_within_hours(
        self, command: str, args: dict[str, Any], forward: Callable[[dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Withdraw the computation that runs longer than the policy allows, with PermissionDeniedError."""
        hours = self._policy.max_hours_per_round
        try:
            async with asyncio.timeout(None if hours is None else hours * 3600) as limit:
                return await self._compute.run(command, args, forward)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise PermissionDeniedError(
                f"refuses: policy allows at most {hours:g} hours a round, and they are over"
            ) from error

    async def release(self) -> None:
        """Give back memory and device; the next task takes them again. Call while no task is in progress."""
        await self._compute.close()

    def _common(self, plan_json: str, run: str) -> dict[str, Any]:
        state = self._home.local_state / run
        state.mkdir(exist_ok=True)
        return {
            "data": self._data,
            "compute": self._compute_config,
            "plan": plan_json,
            "site": self._site,
            "run": run,
            "state": str(state),
        }

    def _reporter(self, run: str, round_number: int, stage: str) -> Callable[[int, int], None]:
        def moved(done: int, total: int) -> None:
            progress = federation_pb2.Progress(
                run=run, round=round_number, stage=stage, done=done, total=total
            )
            self._send(federation_pb2.AgentMessage(progress=progress))

        return moved

    def _forward(self, run: str, round_number: int) -> Callable[[dict[str, Any]], None]:
        def said(fields: dict[str, Any]) -> None:
            progress = federation_pb2.Progress(run=run, round=round_number, **fields)
            self._send(federation_pb2.AgentMessage(progress=progress))

        return said

    def _failed(
        self,
        run: str,
        round_number: int,
        error: FedimpresError | OSError,
        *,
        evaluating: bool = False,
        recalibrating: bool = False,
    ) -> None:
        self._transfers.forget_partial()  # perhaps what filled the disk
        log.error(
            "task failed",
            run=run,
            round=round_number,
            evaluating=evaluating,
            recalibrating=recalibrating,
            code=code_of(error),
            error=str(error),
        )
        failed = federation_pb2.TaskFailed(
            run=run,
            round=round_number,
            reason=wire_text(str(error), 2000),
            evaluating=evaluating,
            recalibrating=recalibrating,
        )
        self._send(federation_pb2.AgentMessage(failed=failed))

    def _forget_other_runs(self, run: str) -> None:
        """Remove what runs before this one left here; what can't be removed is tried again with the next run.

        The coordinator begins a run when those before it have ended, a paused one included, so none comes back.
        """
        if run == self._present_run:
            return
        give_back_freed()
        for folder in self._home.local_state.iterdir():
            if folder.name != run and is_run(folder.name):
                shutil.rmtree(folder, ignore_errors=True)
        for record in self._home.tasks.glob("*~*.json"):
            if record.name.partition("~")[0] != run:
                with contextlib.suppress(OSError):
                    record.unlink()
        self._present_run = run

    def _forget_rounds(self, run: str, before: int, inputs: str) -> None:
        """Remove the updates of rounds that are over, but nothing of the present task's `inputs` (digests).

        The coordinator may ask for what follows an update before its answer to the delivery is here.
        """
        for path in self._home.tasks.glob(f"{run}~*.json"):
            round_number = path.stem.rpartition("~")[2]
            if round_number.isdecimal() and int(round_number) < before:
                with contextlib.suppress(OSError):
                    self._drop_record(path, inputs)

    def _record_path(self, run: str, round_number: int) -> Path:
        return self._home.tasks / f"{run}~{round_number}.json"

    def _drop(self, task: federation_pb2.TrainTask) -> None:
        self._drop_record(self._record_path(task.run, task.round), inputs_of(task))

    def _drop_record(self, path: Path, inputs: str) -> None:
        """Delete a finished task's record, and its update unless that is among `inputs` (digests)."""
        record = load_record(path)
        path.unlink(missing_ok=True)
        if record is not None and record["digest"] not in inputs.split(","):
            self._store.delete(record["digest"])


def inputs_of(task: federation_pb2.TrainTask) -> str:
    """What a training starts from, by digest."""
    return ",".join((task.model.digest, task.impressions.digest, task.strategy_state.digest))


def _read_tensors(path: Path) -> tuple[TensorManifest, bytes]:
    """A tensor file's manifest and payload. Raises StorageError, OSError."""
    manifest, start = read_manifest(path)
    return manifest, path.read_bytes()[start:]


def _log_check(run: str, round_number: int, found: dict[str, Any] | None) -> None:
    """Say at the site what its check of the impressions found."""
    if found is None:
        return
    check = ImpressionCheck.model_validate(found)
    if check.num_refused:
        log.warning(
            "impressions refused" if check.num_trained else "all impressions refused, trained without any",
            run=run,
            round=round_number,
            reason=check.reason,
        )
    else:
        log.info("impressions checked", run=run, round=round_number, number=check.num_checked)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise ProtocolError(f"the coordinator sent a document that is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"the coordinator sent {type(value).__name__}, expected a JSON object")
    return value
