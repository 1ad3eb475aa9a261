"""What impressions look like to independent judges, round by round: docs/results/impressions.json and a picture.

Two judges (`judge.py`), which took part in no choice, say what they see in the banks that two federations (`lab.py`)
made while they ran, and in banks made afterwards through the same global models with the settings `SPECTRAL`, each from
the one before. Beside them stand the loop as published, with three learning rates, and both of ours from nothing. For
the lab only: judges, and the row of real images in the picture, need what no coordinator has.

Prints one JSON object that names the files.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from judge import DATA, JUDGES, Judge, Verdict, open_judge, pooled_images
from judge import HOME as JUDGES_HOME
from lab import HOME as RUNS_HOME
from lab import SPECTRAL, LabRun, lab_run
from matplotlib.figure import Figure
from torch import Tensor

from fedcore.compute_worker import Job
from fedcore.data import transforms
from fedcore.data.dataset import LabelledImages
from fedcore.device import ComputeDevice, open_device
from fedserver.strategies.fedimpres_paper import FedImpresPaperOptions
from fedserver.synthesis.bank import Bank
from fedserver.synthesis.make import make_bank
from fedserver.synthesis.options import SynthesisOptions

PUBLISHED_RATES = (1.0, 10.0, 100.0)
# Rounds of the picture, as shares of the run.
SHOWN = (0.3, 0.5, 0.75, 1.0)
PICTURE_IMAGES = 3


@dataclass(frozen=True, slots=True)
class Court:
    """The judges and what each says of real test images: the measure of the rest."""

    judges: tuple[Judge, ...]
    real: Mapping[str, Verdict]

    def verdicts(self, bank: Bank) -> dict[str, Any]:
        """By judge: share recognised, by class, and spread within classes as a share of real images'."""
        found = {judge.name: judge.judge(bank.images, bank.labels) for judge in self.judges}
        by_class = [
            _mean([verdict.by_class[k] for verdict in found.values()])
            for k in range(len(self.real[self.judges[0].name].by_class))
        ]
        spread = {name: verdict.spread / self.real[name].spread for name, verdict in found.items()}
        return {
            "recognised": _mean([verdict.recognised for verdict in found.values()]),
            "recognised_by_judge": {name: round(v.recognised, 4) for name, v in found.items()},
            "recognised_by_class": by_class,
            "spread_of_real": _mean(list(spread.values())),
            "spread_of_real_by_judge": {name: round(value, 4) for name, value in spread.items()},
        }


def main() -> None:
    """Run as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="bloodmnist")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument(
        "--run", nargs="+", default=["1.0:0", "0.1:100"], metavar="ALPHA:SEED", help="the first one is drawn"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=RUNS_HOME)
    parser.add_argument("--judges", type=Path, default=JUDGES_HOME)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    asked = parser.parse_args()
    device = open_device(asked.device, asked.threads)
    pooled = pooled_images(asked.dataset, asked.data)
    pixels, labels = (torch.from_numpy(a) for a in (pooled.pooled_test.images, pooled.pooled_test.labels))
    judges = tuple(open_judge(spec, pooled, device, asked.judges) for spec in JUDGES)
    court = Court(judges, {judge.name: judge.judge(pixels, labels) for judge in judges})
    runs, pictured = [], None
    for alpha, seed in (text.split(":") for text in asked.run):
        run = lab_run(
            asked.dataset, asked.data, alpha=float(alpha), seed=int(seed), home=asked.runs,
            device=asked.device, threads=asked.threads,
        )  # fmt: skip
        row, banks = examined(run, court, pooled.pooled_test, device)
        runs.append({"alpha": float(alpha), "seed": int(seed), **row})
        pictured = pictured or (run, banks)
    assert pictured is not None
    document = {
        "dataset": pooled.description,
        "hardware": f"{device.kind}: {device.name}, {device.threads} threads",
        "class_names": list(pooled.class_names),
        "real_test_images": {
            name: {"recognised": round(v.recognised, 4), "by_class": v.by_class}
            for name, v in court.real.items()
        },
        "runs": runs,
    }
    results = asked.docs / "results" / "impressions.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    picture = asked.docs / "images" / "impressions-over-rounds.png"
    draw(*pictured, pooled.pooled_test, picture)
    print(json.dumps({"benchmark": "impressions", "written": [str(results), str(picture)]}))


def examined(
    run: LabRun, court: Court, test: LabelledImages, device: ComputeDevice
) -> tuple[dict[str, Any], dict[int, Bank]]:
    """A row a round from the warm-up on, and the rounds' banks."""
    warmup = run.plan.synthesis.warmup_rounds
    first = 1 if warmup == "auto" else max(1, warmup)
    rows: list[dict[str, Any]] = []
    banks: dict[int, Bank] = {}
    bank: Bank | None = None
    for number in range(first, run.plan.rounds + 1):
        state = run.state(number)
        made = make_bank(
            run.plan,
            number,
            state,
            SPECTRAL,
            device=device,
            job=Job(number, lambda message: None),
            previous=bank,
            last_state=run.state(number - 1) if number > 1 else None,
        )
        bank = banks[number] = made.bank
        accuracy, recalls = recalls_of(run, number, test, device)
        rows.append(
            {
                "round": number,
                "global_accuracy": accuracy,
                "global_recall_by_class": recalls,
                **court.verdicts(bank),
                "images": len(bank),
                "rejected": made.figures["rejected"],
            }
        )
        print(f"round {number}: {rows[-1]}", file=sys.stderr, flush=True)
    return {
        "own_settings": dict(run.plan.strategy_options),
        "own_banks": own_banks(run, court),
        "spectral_banks": rows,
        **compared(run, court, first, device),
    }, banks


def own_banks(run: LabRun, court: Court) -> list[dict[str, Any]]:
    """Verdicts on the banks that the run itself made and its sites trained on, a row a round."""
    rows = []
    for path in sorted((run.folder / "impressions").glob("round-*.safetensors")):
        bank = Bank.load(path)
        number = int(path.stem.removeprefix("round-"))
        rows.append({"round": number, **court.verdicts(bank), "images": len(bank)})
    return rows


def compared(run: LabRun, court: Court, first: int, device: ComputeDevice) -> dict[str, Any]:
    """The published loop, after the first round with impressions and the last, and ours made from nothing."""
    last = run.plan.rounds
    published = [
        {"image_lr": rate, **_cold(run, court, number, FedImpresPaperOptions(image_lr=rate), device)}
        for number in (first, last)
        for rate in PUBLISHED_RATES
    ]
    return {
        "published": published,
        "spectral_cold": _cold(run, court, last, SPECTRAL, device),
        "defaults_cold": _cold(run, court, last, SynthesisOptions(), device),
    }


def _cold(
    run: LabRun, court: Court, number: int, options: SynthesisOptions, device: ComputeDevice
) -> dict[str, Any]:
    """Verdicts on a bank made from nothing through the model of a round."""
    job = Job(number, lambda message: None)
    made = make_bank(run.plan, number, run.state(number), options, device=device, job=job)
    return {"round": number, **court.verdicts(made.bank), "images": len(made.bank)}


@torch.no_grad()
def recalls_of(
    run: LabRun, number: int, test: LabelledImages, device: ComputeDevice
) -> tuple[float, list[float]]:
    """Accuracy of a round's global model on real test images, and its recall of each class."""
    net = run.model(number, device)
    labels = torch.from_numpy(test.labels)
    seen = torch.cat(
        [
            net(transforms.normalise(part.to(device.device), run.plan)).argmax(1).cpu()
            for part in torch.split(torch.from_numpy(test.images), 512)
        ]
    )
    right = (seen == labels).float()
    recalls = [round(float(right[labels == k].mean()), 4) for k in range(run.plan.model.classes)]
    return round(float(right.mean()), 4), recalls


def draw(run: LabRun, banks: Mapping[int, Bank], test: LabelledImages, path: Path) -> None:
    """A grid of pictures: a row a round and one of real images, a column a class."""
    numbers = sorted({min(banks, key=lambda n: abs(n - share * run.plan.rounds)) for share in SHOWN})
    names = run.federation.class_names
    real_images, real_labels = (
        torch.from_numpy(test.images).permute(0, 3, 1, 2),
        torch.from_numpy(test.labels),
    )
    rows: list[tuple[str, Tensor, Tensor]] = [
        (f"round {number}", banks[number].images, banks[number].labels) for number in numbers
    ]
    rows.append(("real, of the\ntest set\n(lab only)", real_images, real_labels))
    figure = Figure(figsize=(1.5 * len(names) + 1, 0.62 * len(rows) + 0.5), dpi=150)
    grid = figure.subplots(len(rows), len(names), gridspec_kw={"wspace": 0.06, "hspace": 0.08})
    for line, (title, pixels, labels) in zip(grid, rows, strict=True):
        for k, axes in enumerate(line):
            own = pixels[labels == k][:PICTURE_IMAGES]
            axes.set(xticks=[], yticks=[])
            for side in axes.spines.values():
                side.set_visible(False)
            if len(own):
                axes.imshow(torch.cat(list(own), dim=2).permute(1, 2, 0).numpy())
        line[0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=7)
    for k, name in enumerate(names):
        grid[0][k].set_title(name, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Software": None})


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and not math.isnan(value)]
    return round(math.fsum(known) / len(known), 4) if known else None


if __name__ == "__main__":
    main()
