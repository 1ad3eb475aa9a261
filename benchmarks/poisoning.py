"""What bad sites do to a model, and what the gate and robust aggregation do about it.

    python benchmarks/poisoning.py                  # resumes: a finished run is a line of docs/results/poisoning.jsonl
    python benchmarks/poisoning.py --table          # only the Markdown table of what is there

Eight sites of rebuilt BloodMNIST, two of them bad in every round (`fedsim.attacks`): updates times ten, times minus one,
times minus ten, NaN, or Gaussian noise of ten times their size. A row is a defence, a column an attack; cells are
accuracies on about 100 test images of each site, the mean of the last three rounds and of the seeds. The gate is off but
in its rows.
NaN is refused by every rule, gate or not (and, over the wire, at delivery): plain averaging would have no model at all.
Prints one JSON object: the mean accuracies by defence and attack.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import fedsim
from fedcore.data.benchmark_sets import Federation, load_benchmark
from fedcore.data.dataset import LabelledImages
from fedcore.plan import Plan, validate_plan
from fedsim.attacks import ATTACKS, Attack

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "poisoning.jsonl"
DATA = ROOT.parent / "shared" / "data" / "bloodmnist_rebuilt.npz"
BAD_SITES = ("site-2", "site-5")
CLEAN = "none"
COLUMNS = (CLEAN, *ATTACKS)
SEEDS = (0, 1, 2)
SITES, IMAGES, ALPHA, ROUNDS = 8, 1500, 1.0, 8
# At each site.
TEST_IMAGES = 100
# Rounds at the end whose accuracy counts: a single one is a matter of luck.
LAST = 3

NO_GATE = {"check_norm": False, "check_examples": False}
Defence = Mapping[str, Any]
# Sections of the plan by row.
DEFENCES: dict[str, Defence] = {
    "plain averaging": {"gate": NO_GATE},
    "gate": {},
    "gate, norm_factor 3": {"gate": {"norm_factor": 3.0}},
    # Nothing is shortened: what is too long is refused.
    "gate, refusing": {"gate": {"refuse_factor": 6.0}},
    "gate, norm_factor 3, refusing": {"gate": {"norm_factor": 3.0, "refuse_factor": 3.0}},
    "median": {"gate": NO_GATE, "aggregation": {"rule": "median"}},
    "trimmed_mean, 2": {"gate": NO_GATE, "aggregation": {"rule": "trimmed_mean", "tolerate": 2}},
    "multi_krum, 2": {"gate": NO_GATE, "aggregation": {"rule": "multi_krum", "tolerate": 2}},
    "norm_clip": {"gate": NO_GATE, "aggregation": {"rule": "norm_clip"}},
}


def main() -> None:
    """Run what is missing, then print the table or the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    parser.add_argument("--table", action="store_true", help="print the Markdown table and run nothing")
    asked = parser.parse_args()
    seeds = [int(text) for text in asked.seeds.split(",")]
    if not asked.table:
        run_missing(asked.data, asked.out, seeds)
    means = mean_accuracies(read_lines(asked.out), seeds)
    print(markdown(means) if asked.table else json.dumps({"benchmark": "poisoning", "accuracy": means}))


def run_missing(data: Path, out: Path, seeds: list[int]) -> None:
    """Every cell of every seed that `out` has no line of, a line as soon as it is there."""
    done = {(line["defence"], line["attack"], line["seed"]) for line in read_lines(out)}
    for seed in seeds:
        federation = small_federation(data, seed)
        for attack in COLUMNS:
            for defence, sections in DEFENCES.items():
                if (defence, attack, seed) in done:
                    continue
                line = {"defence": defence, "attack": attack, "seed": seed}
                line |= measure(federation, plan_of(federation, seed, sections), attack)
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(json.dumps(line), file=sys.stderr, flush=True)


def small_federation(data: Path, seed: int) -> Federation:
    """Sites with few held-out images each: scoring all there are would take longer than training."""
    federation = load_benchmark("bloodmnist", data, sites=SITES, alpha=ALPHA, seed=seed, max_train=IMAGES)
    sites = {
        name: replace(
            split,
            validation=thinned(split.validation, 10),
            test=thinned(split.test, TEST_IMAGES),
            indices=None,
        )
        for name, split in federation.sites.items()
    }
    return replace(federation, sites=sites)


def thinned(images: LabelledImages, count: int) -> LabelledImages:
    """About `count` of them, evenly spaced."""
    step = max(1, len(images) // count)
    return LabelledImages(images.images[::step], images.labels[::step])


def plan_of(federation: Federation, seed: int, sections: Defence) -> Plan:
    """FedAvg on a small network, and the defence."""
    return validate_plan(
        {
            "name": "poisoning", "rounds": ROUNDS, "min_sites": 3, "strategy": "fedavg", "seed": seed,
            "model": {
                "name": "cnn", "classes": len(federation.class_names), "input": list(federation.input),
                "options": {"width": 16},
            },
            "training": {"epochs": 1, "batch_size": 32, "learning_rate": 0.05, "precision": "bf16"},
            "data": {"class_names": list(federation.class_names)},
            **sections,
        }
    )  # fmt: skip


def measure(federation: Federation, plan: Plan, attack: str) -> dict[str, Any]:
    """One run: accuracy of the last model (None if the run failed), and what the gate refused."""
    attacks: dict[str, Attack] = {} if attack == CLEAN else dict.fromkeys(BAD_SITES, attack)  # type: ignore[arg-type]
    began = time.monotonic()
    result = fedsim.run(plan, federation, forgetting_rounds=0, check_impressions=False, attacks=attacks)
    refused = [site for record in result.records for site, found in record.gate.items() if not found.passed]
    last = result.records[-LAST:] if len(result.records) == plan.rounds else []
    ratios = [
        found.ratio or 0.0
        for record in result.records
        for site, found in record.gate.items()
        if site not in attacks
    ]
    return {
        "accuracy": statistics.fmean(record.accuracy or 0.0 for record in last) if last else None,
        "accuracies": [record.accuracy for record in result.records],
        "state": result.state,
        "refused_bad": sum(site in attacks for site in refused),
        "refused_honest": sum(site not in attacks for site in refused),
        "largest_honest_ratio": round(max(ratios, default=0.0), 2),
        "config": result.config_hash,
        "seconds": round(time.monotonic() - began, 1),
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def mean_accuracies(lines: list[dict[str, Any]], seeds: list[int]) -> dict[str, dict[str, float | None]]:
    """Mean over the seeds, by defence and attack; None where a seed is missing or its run failed."""
    found = {(line["defence"], line["attack"], line["seed"]): line["accuracy"] for line in lines}
    means: dict[str, dict[str, float | None]] = {}
    for defence in DEFENCES:
        row = means[defence] = {}
        for attack in COLUMNS:
            values = [found.get((defence, attack, seed)) for seed in seeds]
            known = [value for value in values if value is not None]
            row[attack] = round(statistics.fmean(known), 4) if len(known) == len(seeds) else None
    return means


def markdown(means: Mapping[str, Mapping[str, float | None]]) -> str:
    """The table of docs/benchmarks.md."""
    lines = [f"| defence | {' | '.join(COLUMNS)} |", f"|---|{'---|' * len(COLUMNS)}"]
    for defence, row in means.items():
        cells = ["–" if value is None else f"{value:.3f}".removeprefix("0") for value in row.values()]
        lines.append(f"| {defence} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
