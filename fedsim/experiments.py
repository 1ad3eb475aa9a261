"""Many runs: in parallel processes, resumable, each finished run one line in `runs.jsonl`. No torch here.

A line is keyed by the hash of what determines the run, so a repeated command does only what is missing. Lines
are written by the parent alone, whole and durable; a line cut short by a crash is dropped.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from fedcore.data.benchmark_sets import Federation, load_benchmark, load_partition, partition_record
from fedcore.data.saved_partition import split_name
from fedcore.errors import ComputeError, FedimpresError, LearningError, StorageError
from fedcore.home_lock import claimed
from fedcore.plan import plan_from_json
from fedsim.data_choice import DataChoice

RUNS_FILE = "runs.jsonl"
Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class DataSpec:
    """Which federation: the arguments of `load_benchmark`, or a saved partition."""

    dataset: str
    data: str | None
    sites: int | None
    alpha: float | None
    seed: int
    max_train: int | None
    partition: str | None = None
    partition_file: str | None = None

    @classmethod
    def of(cls, choice: DataChoice, seed: int, max_train: int | None = None) -> Self:
        """A choice of options with a seed; paths become absolute."""
        data, saved = choice.data, choice.partition_file
        return cls(
            choice.dataset,
            str(data.resolve()) if data is not None else None,
            choice.sites,
            choice.alpha,
            seed,
            max_train,
            choice.partition,
            str(saved.resolve()) if saved is not None else None,
        )

    @property
    def choice(self) -> DataChoice:
        """The same as a choice of options."""
        data = Path(self.data) if self.data is not None else None
        saved = Path(self.partition_file) if self.partition_file is not None else None
        return DataChoice(self.dataset, data, self.sites, self.alpha, self.partition, saved)

    def load(self) -> Federation:
        """Load it. Raises DataError, ConfigError."""
        data = Path(self.data) if self.data is not None else None
        if self.partition_file is not None:
            return load_partition(Path(self.partition_file), data, dataset=self.dataset)
        return load_benchmark(
            self.dataset,
            data,
            sites=self.sites,
            alpha=self.alpha,
            seed=self.seed,
            max_train=self.max_train,
            partition=self.partition,
        )


@dataclass(frozen=True, slots=True)
class Spec:
    """One run to do. `config` names it; `reference` is "", "pooled" or "single_site"."""

    config: str
    plan_json: str
    data: DataSpec
    profile: str
    strategy: str
    ablation: str | None
    reference: str
    device: str
    threads: int
    forgetting_rounds: int
    folder: str
    command: str


def execute(specs: Sequence[Spec], out: Path, *, workers: int, say: Callable[[str], None]) -> list[Line]:
    """Do the runs that `out/runs.jsonl` lacks, `workers` at a time, and return the lines of all `specs`.

    A run that fails does not stop the others; it is told in the end and done again next time. Raises
    ConflictError if another process uses `out`, LearningError if runs failed, ComputeError if a worker was
    killed.
    """
    with _claimed(out):
        path = out / RUNS_FILE
        lines = {line["config"]: line for line in read_lines(path)}
        # Seed by seed: what is there after an interruption can be compared in pairs.
        missing = {spec.config: spec for spec in specs if spec.config not in lines}
        todo = sorted(missing.values(), key=lambda spec: spec.data.seed)
        say(f"{len(specs)} runs, {len(specs) - len(todo)} of them finished already")
        failures: list[str] = []
        for done, (spec, outcome) in enumerate(_perform_all(todo, workers), 1):
            who = f"{spec.strategy}{f' {spec.ablation}' if spec.ablation else ''} seed {spec.data.seed}"
            if isinstance(outcome, FedimpresError):
                failures.append(f"{who}: {outcome.message}")
                say(f"[{done}/{len(todo)}] {who}: failed: {outcome}")
                continue
            lines[spec.config] = outcome
            _append(path, outcome)
            row = outcome["row"]
            figure = row["balanced_accuracy_last5"]
            shown = "no figure" if figure is None else f"balanced accuracy {figure:.3f}"
            say(f"[{done}/{len(todo)}] {who}: {shown} in {outcome['seconds']:.0f} s")
        if failures:
            raise LearningError(f"{len(failures)} of {len(todo)} runs failed: {'; '.join(failures[:5])}")
        return [lines[spec.config] for spec in specs]


def read_lines(path: Path) -> list[Line]:
    """The finished runs of a file; none if there is no file. A last line cut short is left out.

    Raises StorageError if another line is damaged.
    """
    if not path.is_file():
        return []
    whole = path.read_text(encoding="utf-8").split("\n")[:-1]
    try:
        return [json.loads(line) for line in whole if line]
    except ValueError as error:
        raise StorageError(f"{path}: a line is not JSON: {error}", hint="delete that line") from error


def perform(spec: Spec) -> Line:
    """Do one run in this process and return its line.

    Raises FedimpresError, LearningError if the run failed.
    """
    from fedsim.projection import write_projection
    from fedsim.references import POOLED, SINGLE_SITE, run_pooled, run_single_site
    from fedsim.runs import run, write_result
    from fedsim.summary import curves_of, figures_of, picked_of

    folder = Path(spec.folder)
    shutil.rmtree(folder, ignore_errors=True)
    federation = spec.data.load()
    plan = plan_from_json(spec.plan_json)
    if spec.reference:
        train = {POOLED: run_pooled, SINGLE_SITE: run_single_site}[spec.reference]
        result = train(plan, federation, threads=spec.threads, device=spec.device, out=folder)
    else:
        result = run(
            plan,
            federation,
            threads=spec.threads,
            device=spec.device,
            out=folder,
            forgetting_rounds=spec.forgetting_rounds,
            # The sites are simulated: there is nothing to guard, and hundreds of runs to wait for.
            check_impressions=False,
        )
    if result.state not in ("DONE", "DEGRADED"):
        raise LearningError(f"the run ended {result.state}: {result.reason}")
    made = sorted(result.impressions)
    # The first, a middle and the last show how impressions change; a hundred runs' other banks would fill the
    # disk.
    for number in set(made) - {made[i] for i in {0, (len(made) - 1) // 2, len(made) - 1} if made}:
        result.impressions[number].unlink()
    if made:
        write_projection(result, federation, folder)
    # A reference ran on one site of its own making; the split is the federation's.
    split = partition_record(federation)
    write_result(replace(result, config_hash=spec.config, split=split), spec.command)
    row = {
        "profile": spec.profile,
        "dataset": spec.data.dataset,
        "alpha": federation.alpha,
        "model": plan.model.name,
        "strategy": spec.strategy,
        "ablation": spec.ablation,
        "seed": spec.data.seed,
        **figures_of(result.records, result.best_round, result.forgetting),
        "hardware": result.hardware,
        "state": result.state,
    }
    return {
        "config": spec.config,
        "row": row,
        "curves": curves_of(result.records),
        **picked_of(result.records, result.best_round, result.forgetting),
        "partition": federation.partition,
        "split": split_name(split),
        "seconds": round(result.seconds, 3),
        "state": result.state,
        "reason": result.reason,
        "model": result.model_digest,
        "folder": f"{folder.parent.name}/{folder.name}",
        "spec": _without_places(spec),
    }


def _without_places(spec: Spec) -> dict[str, Any]:
    """A spec as a line keeps it: without this machine's paths, so that lines can be shared."""
    document = asdict(spec)
    del document["folder"]
    if spec.data.data is not None:
        document["data"]["data"] = Path(spec.data.data).name
    if spec.data.partition_file is not None:
        document["data"]["partition_file"] = Path(spec.data.partition_file).name
    return document


def _perform_all(todo: Sequence[Spec], workers: int) -> Iterator[tuple[Spec, Line | FedimpresError]]:
    """Outcomes as they come. Raises ComputeError if a worker dies; leaves no process behind."""
    if not todo:
        return
    pool = ProcessPoolExecutor(
        min(workers, len(todo)), multiprocessing.get_context("spawn"), initializer=_live_with_parent
    )
    try:
        pending: dict[Future[Line], Spec] = {pool.submit(perform, spec): spec for spec in todo}
        while pending:
            finished, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                spec = pending.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise ComputeError(
                        "a worker process was killed (out of memory?)",
                        hint="the same command goes on where it stopped; try fewer --workers",
                    ) from error
                if error is not None and not isinstance(error, FedimpresError):
                    raise error
                yield spec, error if isinstance(error, FedimpresError) else future.result()
    finally:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            # A run in progress is done again next time; nobody waits for it now.
            process.terminate()
        for process in processes:
            process.join()


def _live_with_parent() -> None:
    """End this worker when its parent ends, whatever ends the parent; Ctrl-C is for the parent alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _append(path: Path, line: Line) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"{path}: can't be written: {error}") from error


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Hold the folder, its last line mended. Raises ConflictError if another process holds it."""
    with claimed(out, "fedsim"):
        path = out / RUNS_FILE
        if path.is_file():
            data = path.read_bytes()
            if data and not data.endswith(b"\n"):
                print(f"{path}: dropped a line that was cut short", file=sys.stderr)
                path.write_bytes(data[: data.rfind(b"\n") + 1])
        yield
