"""`run`: simulate a plan on a federation, and what comes of it."""

import json
import shutil
import tempfile
import time
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedcore.data.benchmark_sets import Federation, partition_record
from fedcore.data.saved_partition import partition_text
from fedcore.device import ComputeDevice, open_device
from fedcore.errors import ConflictError, StorageError
from fedcore.plan import Plan
from fedcore.round_record import RoundRecord
from fedcore.version import software_version
from fedserver.finished_round import FinishedRound
from fedserver.round_events import Event
from fedsim.attacks import Attack
from fedsim.identity import FORGETTING_ROUNDS, config_hash
from fedsim.showing import RUN_FILE
from fedsim.simulation import OnRound, Outcome, Simulation


@dataclass(frozen=True)
class Result:
    """A simulated run that is over.

    `model` is the last global model, `best_model` that of the round `best_round`, which validation picked;
    None where no round finished. `impressions` and `forgetting` are by round. Files lie in `folder`, which
    lives as long as this object unless `out` was given.
    """

    plan: Plan
    state: str
    reason: str
    records: list[RoundRecord]
    best_round: int | None
    model: Path | None
    model_digest: str
    best_model: Path | None
    impressions: Mapping[int, Path]
    forgetting: Mapping[int, float | None]
    events: tuple[Event, ...]
    seconds: float
    config_hash: str
    split: Mapping[str, Any]
    hardware: str
    folder: Path


def run(
    plan: Plan,
    federation: Federation,
    *,
    threads: int = 1,
    device: str = "cpu",
    on_round: OnRound | None = None,
    out: Path | None = None,
    forgetting_rounds: int = FORGETTING_ROUNDS,
    check_impressions: bool = True,
    command: str = "",
    attacks: Mapping[str, Attack] | None = None,
    late_sites: Collection[str] = (),
) -> Result:
    """Simulate `plan` with the sites of `federation`.

    On the CPU, plan, split and `threads` determine every bit of the result, and a federation over gRPC with
    as many threads comes to the same. Forgetting is measured in the last `forgetting_rounds` rounds.
    `check_impressions` is each site's check of the impressions that it gets (docs/privacy.md).
    `on_round(record, model)` is called after each round; the file `model` is there until it returns. `out`
    keeps the results, with `command` as the way to repeat them; without it they last as long as the Result.
    torch's settings are put back in the end. `attacks` names sites that send something else than what they trained,
    `late_sites` those whose update is there only when its round has closed.

    A run whose sites or rounds fail ends in the state FAILED or DEGRADED, as in production. Raises PlanError,
    DataError, ComputeError (no such device), ConflictError (`out` holds a run), StorageError.
    """
    if out is not None:
        claim(out)
    began = time.monotonic()
    with _scratch(out) as scratch, _torch_settings():
        opened = open_device(device, threads)
        simulation = Simulation(
            plan,
            federation,
            device=opened,
            device_option=device,
            folder=scratch,
            forgetting_rounds=forgetting_rounds,
            on_round=on_round,
            check_impressions=check_impressions,
            attacks=attacks,
            late_sites=late_sites,
        )
        outcome = simulation.perform()
        folder = out if out is not None else Path(tempfile.mkdtemp(prefix="fedsim-"))
        split = partition_record(federation)
        result = _collect(
            plan,
            outcome,
            folder=folder,
            seconds=time.monotonic() - began,
            config=config_hash(
                plan,
                split,
                device=device,
                threads=threads,
                forgetting_rounds=forgetting_rounds,
                check_impressions=check_impressions,
                attacks=attacks,
                late_sites=late_sites,
            ),
            split=split,
            hardware=hardware_name(opened),
        )
    if out is None:
        weakref.finalize(result, shutil.rmtree, folder, True)
    write_result(result, command)
    return result


def hardware_name(device: ComputeDevice) -> str:
    """A device in words: "cpu: Intel(R) Xeon(R), 1 thread"."""
    threads = f"{device.threads} thread{'s' if device.threads != 1 else ''}"
    return f"{device.kind}: {device.name}, {threads}"


def claim(out: Path) -> None:
    """Make the folder of a run. Raises ConflictError if it holds one, StorageError if it can't be used."""
    if (out / RUN_FILE).exists():
        raise ConflictError(f"{out} holds a run; nothing was changed", hint="choose another with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{out}: can't be used: {error}") from error


def write_result(result: Result, command: str) -> None:
    """Write rounds.jsonl, events.jsonl, plan.json, partition.json and, last, run.json.

    Raises StorageError.
    """
    folder = result.folder
    document = {
        "config": result.config_hash,
        "command": command,
        "state": result.state,
        "reason": result.reason,
        "rounds": len(result.records),
        "best_round": result.best_round,
        "model_digest": result.model_digest,
        "forgetting": {str(number): value for number, value in result.forgetting.items()},
        "seconds": round(result.seconds, 3),
        "hardware": result.hardware,
        "versions": {"fedimpres": software_version(), "torch": torch.__version__},
    }
    try:
        (folder / "rounds.jsonl").write_text("".join(f"{r.model_dump_json()}\n" for r in result.records))
        (folder / "events.jsonl").write_text("".join(f"{e.model_dump_json()}\n" for e in result.events))
        (folder / "plan.json").write_text(result.plan.to_json() + "\n", encoding="utf-8")
        (folder / "partition.json").write_text(partition_text(result.split), encoding="utf-8")
        (folder / RUN_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{folder}: results can't be written: {error}") from error


def _collect(
    plan: Plan,
    outcome: Outcome,
    *,
    folder: Path,
    seconds: float,
    config: str,
    split: Mapping[str, Any],
    hardware: str,
) -> Result:
    """Take the files that stay out of the scratch folder."""
    state = outcome.state
    best = state.best
    last = state.records[-1] if state.records else None
    kept: dict[int, Path] = {}
    if outcome.impressions:
        (folder / "impressions").mkdir(exist_ok=True)
    for number, path in outcome.impressions.items():
        kept[number] = folder / "impressions" / f"round-{number:05d}.safetensors"
        shutil.copyfile(path, kept[number])
    return Result(
        plan=plan,
        state=str(state.status),
        reason=state.reason,
        records=[finished.record() for finished in state.records],
        best_round=best.round if best is not None else None,
        model=_keep(outcome, last, folder / "model.safetensors"),
        model_digest=last.model if last is not None else "",
        best_model=_keep(outcome, best, folder / "best.safetensors"),
        impressions=kept,
        forgetting=outcome.forgetting,
        events=outcome.events,
        seconds=seconds,
        config_hash=config,
        split=split,
        hardware=hardware,
        folder=folder,
    )


def _keep(outcome: Outcome, record: FinishedRound | None, target: Path) -> Path | None:
    if record is None:
        return None
    shutil.copyfile(outcome.models[record.round], target)
    return target


@contextmanager
def _scratch(out: Path | None) -> Iterator[Path]:
    """A folder for artifacts, gone in the end; on the disk of `out`, since /tmp may be memory."""
    folder = Path(tempfile.mkdtemp(prefix="scratch-", dir=out))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _torch_settings() -> Iterator[None]:
    """Put threads, determinism and the global generator back: a simulation is a guest in its process."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
