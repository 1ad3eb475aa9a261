"""Everything behind docs/results.md: tunes, runs, writes. Resumable: a finished run is never done again.

    python benchmarks/results.py tune main ablations full page     # hours; any of the stages, in any number of calls
    python benchmarks/results.py quick                             # a corner of the table, compared with what is stored

Each finished run is a line of docs/results/runs.jsonl, keyed by the hash of its configuration. The hash does not cover
the code: after a change of an algorithm, delete its lines.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import study
from results_page import write_pages

import fedsim  # noqa: F401 - prepares the numerics before torch
from fedsim.comparison import Comparison, comparison_specs
from fedsim.experiments import RUNS_FILE, Line, Spec, execute, read_lines
from fedsim.protocol import STORED_SETTINGS, merged, stored_settings

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
# How far a mean of five rounds may be from the stored one: another processor (or another cache: kernels cut their work
# by it) rounds otherwise, and twenty rounds of training make points of it. On the same machine it is the same number.
TOLERANCE = 0.10


def main() -> int:
    """Run the stages named on the command line; 1 if the quick corner differs from what is stored."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "stages", nargs="+", choices=["tune", "main", "ablations", "recalibrated", "full", "page", "quick"]
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the npz files")
    parser.add_argument(
        "--scratch", type=Path, default=ROOT / "results-out", help="models and banks of the runs"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--strategies", default="", help="only these, separated by commas")
    parser.add_argument(
        "--tasks", default="", help="only these: bloodmnist-0.1, bloodmnist-0.05, wbc_multisite, ..."
    )
    parser.add_argument("--seeds", default="", help="only these, separated by commas")
    asked = parser.parse_args()
    study_runs = Study(asked)
    for stage in asked.stages:
        if stage == "page":
            write_pages(read_lines(RESULTS / RUNS_FILE), ROOT / "docs")
        elif stage == "quick":
            return study_runs.quick()
        else:
            getattr(study_runs, stage)()
    return 0


class Study:
    """The stages, narrowed to what was asked for."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self._data: Path = asked.data
        self._scratch: Path = asked.scratch.resolve()
        self._workers: int = asked.workers
        self._strategies = [name for name in asked.strategies.split(",") if name]
        self._tasks = [name for name in asked.tasks.split(",") if name]
        self._seeds = [int(seed) for seed in asked.seeds.split(",") if seed]

    def tune(self) -> None:
        """Six trials a method and task, each away from the best so far; the best becomes the stored setting."""
        for task in self._wanted_tasks(study.TUNED_ON):
            climbs = {name: Climb(name, task) for name in self._wanted(study.STRATEGIES)}
            for number in range(len(next(iter(study.MOVES.values()))) + 1):
                trials = {name: climb.trial(number) for name, climb in climbs.items()}
                lines = self._run(
                    [
                        self._spec(
                            task,
                            name,
                            study.TUNING_SEED,
                            trial,
                            ablation=f"trial {number}",
                            forgetting_rounds=0,
                        )
                        for name, trial in trials.items()
                    ]
                )
                for climb, line in zip(climbs.values(), lines, strict=True):
                    climb.told(line)
            for climb in climbs.values():
                store(task.dataset, climb.name, climb.best)

    def main(self) -> None:
        """Every strategy on every task, seed by seed; the mild skew and ten seeds for those that claims are about."""
        rows = [
            (task, name, seed)
            for task in study.MAIN_TASKS
            for name in (*study.STRATEGIES, *study.REFERENCES)
            for seed in (*study.SEEDS, *(study.MORE_SEEDS if name in study.CLAIMED else ()))
        ]
        rows += [(study.MILD_SKEW, name, seed) for name in study.CLAIMED for seed in study.SEEDS]
        self._run(self._rows(rows))

    def ablations(self) -> None:
        """Ours with one thing changed, at alpha 0.1."""
        if not self._wanted(("fedimpres",)):
            return
        tuned = stored_settings("bloodmnist").get("fedimpres", {})
        specs = [
            self._spec(study.SKEW, "fedimpres", seed, merged(tuned, change), ablation=name)
            for seed in self._wanted_seeds(study.ABLATION_SEEDS)
            for name, change in study.ABLATIONS.items()
        ]
        self._run(specs)

    def recalibrated(self) -> None:
        """Those that the claims are about, with BatchNorm statistics measured after each merge."""
        self._run(
            [
                self._spec(task, name, seed, settings, ablation=study.RECALIBRATED)
                for seed in self._wanted_seeds(study.SEEDS)
                for task in self._wanted_tasks(study.RECALIBRATED_TASKS)
                for name, settings in study.RECALIBRATED_SETTINGS.items()
                if self._wanted((name,))
            ]
        )

    def full(self) -> None:
        """All images and 40 rounds."""
        rows = [(study.SKEW, name, seed) for name in study.FULL_PROFILE for seed in study.FULL_SEEDS]
        self._run(self._rows(rows, profile="full"))

    def quick(self) -> int:
        """Do a corner of the table again, elsewhere, and hold it against what is stored. 1 if it differs."""
        rows = [(task, name, 0) for task in (study.REAL_SITES, study.SKEW) for name in study.CLAIMED]
        stored = {line["config"]: line["row"] for line in read_lines(RESULTS / RUNS_FILE)}
        differing = 0
        for line in execute(self._rows(rows), self._scratch / "quick", workers=self._workers, say=say):
            row, before = line["row"], stored.get(line["config"])
            verdict = compared(row, before)
            differing += verdict != "ok"
            name = f"{row['strategy']} on {row['dataset']}, seed {row['seed']}"
            there = "nothing" if before is None else f"{before['balanced_accuracy_last5']:.4f}"
            print(f"{name}: {row['balanced_accuracy_last5']:.4f} here, {there} stored: {verdict}", flush=True)
        return min(differing, 1)

    def _rows(self, rows: Sequence[tuple[study.Task, str, int]], profile: str = "small") -> list[Spec]:
        tasks = self._wanted_tasks({task for task, _, _ in rows})
        return [
            self._spec(task, name, seed, stored_settings(task.dataset).get(name, {}), profile=profile)
            for task, name, seed in rows
            if task in tasks and self._wanted((name,)) and self._wanted_seeds((seed,))
        ]

    def _spec(
        self,
        task: study.Task,
        strategy: str,
        seed: int,
        settings: Mapping[str, Any],
        *,
        profile: str = "small",
        ablation: str | None = None,
        forgetting_rounds: int = 5,
    ) -> Spec:
        (spec,) = comparison_specs(
            Comparison(
                dataset=task.dataset,
                data=self._data / task.file,
                strategies=(strategy,),
                seeds=(seed,),
                alpha=task.alpha,
                out=self._scratch,
                profile=profile,
                settings={strategy: settings},
                forgetting_rounds=forgetting_rounds,
            ),
            ablation=ablation,
        )
        return spec

    def _run(self, specs: Sequence[Spec]) -> list[Line]:
        return execute(specs, RESULTS, workers=self._workers, say=say) if specs else []

    def _wanted(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if not self._strategies or name in self._strategies]

    def _wanted_seeds(self, seeds: Sequence[int]) -> list[int]:
        return [seed for seed in seeds if not self._seeds or seed in self._seeds]

    def _wanted_tasks(self, tasks: "Sequence[study.Task] | set[study.Task]") -> list[study.Task]:
        return [task for task in tasks if not self._tasks or task.name in self._tasks]


class Climb:
    """The tuning of one method: the best setting so far, and the moves away from it."""

    def __init__(self, name: str, task: study.Task) -> None:
        self.name = name
        self._moves = study.MOVES_ON.get(task.name, {}).get(name, study.MOVES[name])
        self.best: study.Document = {}
        self._score = float("-inf")
        self._tried = self.best

    def trial(self, number: int) -> study.Document:
        """The setting of a trial, from 0."""
        move = self._moves[number - 1] if number else {}
        self._tried = merged(self.best, move)
        return self._tried

    def told(self, line: Line) -> None:
        """Keep the setting if validation says so."""
        score = validated(line)
        if score > self._score:
            self.best, self._score = self._tried, score


def compared(row: Mapping[str, Any], before: Mapping[str, Any] | None) -> str:
    """How a repeated run's row agrees with the stored one: "ok", or what is wrong."""
    if before is None:
        return "NOT STORED"
    apart = abs(row["balanced_accuracy_last5"] - before["balanced_accuracy_last5"])
    return "ok" if apart <= TOLERANCE else f"DIFFERS by {apart:.4f}"


def validated(line: Line) -> float:
    """Mean validation accuracy of a run's last five rounds."""
    last: list[float] = line["curves"]["validation_accuracy"][-5:]
    return sum(last) / len(last)


def store(dataset: str, strategy: str, settings: study.Document) -> None:
    """Make a setting the one that `fedsim compare` takes."""
    document = json.loads(STORED_SETTINGS.read_text()) if STORED_SETTINGS.exists() else {}
    document.setdefault(dataset, {})[strategy] = settings
    STORED_SETTINGS.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
