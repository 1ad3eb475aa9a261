"""What fewer bytes cost in accuracy: one JSON object on stdout, a Markdown table on stderr.

FedAvg on rebuilt BloodMNIST (own split, 8 sites), seeds 0-4; nothing but `[transfer]` differs between the rows.
Two runs that differ in one bit go apart, and half a point is to be seen: so the sites are almost alike (Dirichlet 100),
all images take part (full profile, twelve rounds of one epoch), the rate falls to nothing, and GroupNorm keeps no
statistics that a round could upset. (With 3,000 images, BatchNorm and a constant rate, the differences of five seeds
had a 95 % interval of 2.5 to 4.4 points.)
Finished runs are lines of `docs/results/update_bytes/runs.jsonl` and are not done again.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import fedsim  # noqa: F401 - prepares the numerics before torch
from fedsim.comparison import Comparison, comparison_specs
from fedsim.experiments import Line, Spec, execute
from fedsim.statistics import paired_difference

ROOT = Path(__file__).resolve().parent.parent
CODINGS: dict[str, dict[str, Any]] = {
    "lossless": {},
    "bf16": {"updates": "bf16"},
    "int8": {"updates": "int8"},
    "top_k 0.1": {"updates": "top_k", "top_k_share": 0.1},
}
SEEDS = (0, 1, 2, 3, 4)
METRIC = "accuracy_last5"


def main() -> None:
    """Do what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/bloodmnist_rebuilt.npz"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "update_bytes")
    parser.add_argument("--workers", type=int, default=1)
    asked = parser.parse_args()
    specs = [spec for name in CODINGS for spec in specs_of(name, asked.data, asked.out)]
    lines = execute(specs, asked.out, workers=asked.workers, say=lambda text: print(text, file=sys.stderr))
    rows = summarised(lines)
    print(table(rows), file=sys.stderr)
    print(json.dumps({"benchmark": "update_bytes", "rows": rows, "hardware": lines[0]["row"]["hardware"]}))


def specs_of(name: str, data: Path, out: Path) -> list[Spec]:
    """The runs of one coding."""
    settings = {
        "model": {"norm": "group"},
        "training": {"epochs": 1, "schedule": "cosine"},
        "transfer": CODINGS[name],
    }
    return comparison_specs(
        Comparison(
            dataset="bloodmnist",
            data=data,
            strategies=("fedavg",),
            seeds=SEEDS,
            alpha=100.0,
            out=out,
            profile="full",
            rounds=12,
            settings={"fedavg": settings},
            forgetting_rounds=0,
        ),
        ablation=name,
    )


def summarised(lines: list[Line]) -> list[dict[str, Any]]:
    """A row a coding: accuracy, its difference to lossless paired by seed, bytes up and down a round."""
    by_name = {name: [line["row"] for line in lines if line["row"]["ablation"] == name] for name in CODINGS}
    rows = []
    for name, found in by_name.items():
        difference = paired_difference(found, by_name["lossless"], METRIC) if name != "lossless" else None
        rows.append(
            {
                "coding": name,
                "accuracy": statistics.mean(row[METRIC] for row in found),
                "by_seed": [row[METRIC] for row in found],
                "points": None if difference is None else 100 * difference.mean,
                "points_interval": None
                if difference is None or difference.half_width is None
                else 100 * difference.half_width,
                "mb_per_round": statistics.mean(row["bytes_per_round"] for row in found) / 1e6,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    text = [
        "| coding | accuracy, last 5 | against lossless, points | MB a round, both ways |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        points = "–" if row["points"] is None else f"{row['points']:+.2f} ± {row['points_interval']:.2f}"
        text.append(f"| {row['coding']} | {row['accuracy']:.4f} | {points} | {row['mb_per_round']:.2f} |")
    return "\n".join(text)


if __name__ == "__main__":
    main()
