"""`fedsim compare`, `fedsim sweep`, `fedsim plot`: which runs make them up. No torch in this process."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.data.benchmark_sets import Federation, partition_record
from fedcore.errors import ConfigError
from fedcore.plan import Plan
from fedserver.strategies import load_strategy
from fedsim.data_choice import DataChoice
from fedsim.experiments import RUNS_FILE, DataSpec, Line, Spec, execute, read_lines
from fedsim.identity import FORGETTING_ROUNDS, config_hash
from fedsim.protocol import Axis, Document, Profile, plan_of, profile_of, stored_settings, variants
from fedsim.writing import write_results

REFERENCES = ("pooled", "single_site")
Say = Callable[[str], None]
_NOTHING = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `fedsim compare` was asked for. `sites` and `rounds` None leave the choice to the profile."""

    dataset: str
    data: Path | None
    strategies: tuple[str, ...]
    seeds: tuple[int, ...]
    alpha: float | None
    out: Path
    profile: str = "small"
    sites: int | None = None
    rounds: int | None = None
    model: str = "cnn"
    # By strategy; None takes the stored ones of the data set.
    settings: Mapping[str, Document] | None = None
    settings_path: Path | None = None
    device: str = "cpu"
    threads: int = 1
    workers: int = 1
    forgetting_rounds: int = FORGETTING_ROUNDS
    partition: str | None = None
    partition_file: Path | None = None

    @property
    def choice(self) -> DataChoice:
        """The data and how it is dealt."""
        return DataChoice(
            self.dataset, self.data, self.sites, self.alpha, self.partition, self.partition_file
        )

    def command(self, strategy: str, seed: int) -> str:
        """The command that repeats one of the runs."""
        parts = ["fedsim", "compare", "--dataset", self.dataset]
        parts += [] if self.data is None else ["--data", str(self.data)]
        parts += ["--strategies", strategy, "--seeds", str(seed), "--profile", self.profile]
        parts += self.choice.split_arguments()
        parts += [] if self.rounds is None else ["--rounds", str(self.rounds)]
        parts += ["--model", self.model, "--device", self.device, "--threads", str(self.threads)]
        parts += ["--forgetting-rounds", str(self.forgetting_rounds)]
        parts += [] if self.settings_path is None else ["--settings", str(self.settings_path)]
        return shlex.join([*parts, "--out", "DIR"])


def compare(asked: Comparison, say: Say) -> list[Line]:
    """Do the missing runs, write tables, curves and report into `out`; return the lines as asked for.

    Raises PlanError, DataError, ConfigError, ConflictError, LearningError (runs failed), ComputeError.
    """
    lines = execute(comparison_specs(asked), asked.out, workers=asked.workers, say=say)
    write_results(lines, asked.out)
    return lines


def comparison_specs(asked: Comparison, ablation: str | None = None) -> list[Spec]:
    """The runs of a comparison, a strategy after another, checked before the first one starts.

    `ablation` names what differs from the main rows, if anything does.
    """
    profile = profile_of(asked.profile)
    settings = stored_settings(asked.dataset) if asked.settings is None else asked.settings
    specs = []
    for strategy in asked.strategies:
        for seed in asked.seeds:
            data = _data_spec(asked, profile, seed)
            federation, split = _federation(data)
            reference = strategy if strategy in REFERENCES else ""
            plan = plan_of(
                profile,
                federation,
                "fedavg" if reference else strategy,
                seed=seed,
                rounds=asked.rounds,
                model=asked.model,
                settings=settings.get(strategy),
            )
            load_strategy(plan)
            specs.append(
                _spec(
                    plan,
                    data,
                    split,
                    out=asked.out,
                    device=asked.device,
                    threads=asked.threads,
                    forgetting_rounds=asked.forgetting_rounds,
                    profile=profile.name,
                    strategy=strategy,
                    reference=reference,
                    ablation=ablation,
                    command=asked.command(strategy, seed),
                )
            )
    return specs


@dataclass(frozen=True, slots=True)
class Sweep:
    """What `fedsim sweep` was asked for: a plan, the values to try, the data, the seeds."""

    plan: Plan
    plan_path: Path
    axes: tuple[Axis, ...]
    data: DataSpec
    seeds: tuple[int, ...]
    out: Path
    device: str = "cpu"
    threads: int = 1
    workers: int = 1
    forgetting_rounds: int = FORGETTING_ROUNDS


def sweep(asked: Sweep, say: Say) -> list[Line]:
    """Do the missing runs of every combination and write what `compare` writes. Raises what `compare` raises.

    Choose by `validation_accuracy`: the test figures are for the report.
    """
    specs = []
    for chosen, variant in variants(asked.plan, asked.axes):
        load_strategy(variant)
        for seed in asked.seeds:
            plan = variant.model_copy(update={"seed": seed})
            data = replace(asked.data, seed=seed)
            _, split = _federation(data)
            specs.append(
                _spec(
                    plan,
                    data,
                    split,
                    out=asked.out,
                    device=asked.device,
                    threads=asked.threads,
                    forgetting_rounds=asked.forgetting_rounds,
                    profile="custom",
                    strategy=plan.strategy,
                    ablation=" ".join(chosen),
                    command=_sweep_command(asked, chosen, seed),
                )
            )
    lines = execute(specs, asked.out, workers=asked.workers, say=say)
    write_results(lines, asked.out)
    return lines


def plot(out: Path) -> list[Line]:
    """Write tables, curves and report of all finished runs in `out` again.

    Raises ConfigError if there are none.
    """
    lines = read_lines(out / RUNS_FILE)
    if not lines:
        raise ConfigError(f"{out}: has no finished run in {RUNS_FILE}", hint="start with: fedsim compare")
    write_results(lines, out)
    return lines


def _spec(
    plan: Plan,
    data: DataSpec,
    split: Mapping[str, Any],
    *,
    out: Path,
    device: str,
    threads: int,
    forgetting_rounds: int,
    profile: str,
    strategy: str,
    command: str,
    reference: str = "",
    ablation: str | None = None,
) -> Spec:
    config = config_hash(
        plan, split, device=device, threads=threads, forgetting_rounds=forgetting_rounds, reference=reference
    )
    return Spec(
        config=config,
        plan_json=plan.to_json(),
        data=data,
        profile=profile,
        strategy=strategy,
        ablation=ablation,
        reference=reference,
        device=device,
        threads=threads,
        forgetting_rounds=forgetting_rounds,
        folder=str(out / "runs" / config),
        command=command,
    )


def _data_spec(asked: Comparison, profile: Profile, seed: int) -> DataSpec:
    if asked.partition_file is not None:
        return DataSpec.of(asked.choice, seed)
    if asked.choice.real_sites:
        # A real site's images are its own: no profile cuts them.
        return DataSpec.of(replace(asked.choice, alpha=None), seed)
    return DataSpec.of(replace(asked.choice, sites=asked.sites or profile.sites), seed, profile.max_train)


def _sweep_command(asked: Sweep, chosen: Sequence[str], seed: int) -> str:
    data = asked.data
    parts = ["fedsim", "sweep", str(asked.plan_path), "--dataset", data.dataset]
    parts += [] if data.data is None else ["--data", data.data]
    parts += data.choice.split_arguments()
    parts += [] if data.max_train is None else ["--max-train", str(data.max_train)]
    for setting in chosen:
        parts += ["--set", setting]
    parts += ["--device", asked.device, "--threads", str(asked.threads)]
    parts += ["--forgetting-rounds", str(asked.forgetting_rounds)]
    return shlex.join([*parts, "--seeds", str(seed), "--out", "DIR"])


@lru_cache(maxsize=16)
def _federation(data: DataSpec) -> tuple[Federation, dict[str, Any]]:
    """A federation's shape and its split record; its images are let go of."""
    federation = data.load()
    record = partition_record(federation)
    return replace(federation, sites={}, pooled_test=federation.pooled_test.take(_NOTHING)), record
