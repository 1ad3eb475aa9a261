"""How long until impressions are worth something: one JSON object on stdout.

Seconds until independent judges (`judge.py`) recognise a share (0.70, the mean of the two) of a class-balanced bank
of 160 impressions, same global model, device and precision, for

* `deep_inversion`: Adam from white noise with BatchNorm statistics, total variation, jitter and flips (Yin et al.
  2020), remade from nothing;
* `cold`: our defaults, without a bank;
* `refresh`: our defaults a round later: the bank of `cold` and the next round's global model;
* `spectral_cold`, `spectral_refresh`: the same with the settings `SPECTRAL` of `lab.py`;
* `published`: the published loop of FedImpres (a row without a ratio).

For each, runs of growing step counts are timed alone, each from its start; the first that reaches the share counts.
All that is repeated, each time from other noise, the methods in turn; a row has the medians. On a machine that others
use too, processor seconds say more than seconds on the wall: both are told.

The global models are those of the last two rounds of a federation (`lab.py`). The judges are for the lab: they see
real images that no coordinator has.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from judge import DATA, JUDGES, Judge, open_judge, pooled_images
from judge import HOME as JUDGES_HOME
from lab import HOME as RUNS_HOME
from lab import SPECTRAL, lab_run
from torch import Tensor

from fedcore.data import transforms
from fedcore.device import ComputeDevice, open_device
from fedcore.models.base import FederatedModel
from fedcore.plan import Plan
from fedserver.strategies.fedimpres_paper import FedImpresPaperOptions
from fedserver.synthesis.bank import Bank, Composition, class_sizes, compose
from fedserver.synthesis.optimise import ImageOptimiser, Part
from fedserver.synthesis.options import COLD_STEPS, WARM_STEPS, SynthesisOptions
from fedserver.synthesis.start import starting_images

IMPRESSIONS = 160
DEEP_INVERSION = SynthesisOptions(
    start="white", space="pixels", image_lr=0.05, stationarity=0.0, batch_norm=10.0, first_layer_weight=10.0,
    total_variation=0.05, l2=1e-4, jitter=2, flip=True, warm_start=False, gate=False,
)  # fmt: skip
METHODS: dict[str, SynthesisOptions] = {
    "cold": SynthesisOptions(),
    "refresh": SynthesisOptions(),
    "spectral_cold": SPECTRAL,
    "spectral_refresh": SPECTRAL,
    "deep_inversion": DEEP_INVERSION,
    "published": FedImpresPaperOptions(),
}
COLD_LADDER, REFRESH_LADDER = (20, 40, 60, 80, 100, 200), (1, 2, 3, 5, 10, 20, 40)
LADDERS = {
    "cold": COLD_LADDER,
    "refresh": REFRESH_LADDER,
    "spectral_cold": COLD_LADDER,
    "spectral_refresh": REFRESH_LADDER,
    "deep_inversion": (50, 100, 200, 400, 800, 1600),
    "published": (10,),
}


@dataclass(frozen=True, slots=True)
class Lab:
    """Two successive global models, the judges and what it takes to use them."""

    plan: Plan
    device: ComputeDevice
    model: FederatedModel
    next_model: FederatedModel
    judges: tuple[Judge, ...]
    accuracy: dict[str, float]

    def recognised(self, pixels: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of the images that each judge sees as their label."""
        return {judge.name: round(judge.judge(pixels, labels).recognised, 4) for judge in self.judges}


def main() -> None:
    """Run the benchmark as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="bloodmnist")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--alpha", type=float, default=1.0, help="skew of the global model's sites")
    parser.add_argument("--seed", type=int, default=0, help="of the run that made the global model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.70, help="of the bank, that must be recognised")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--max-seconds", type=float, default=300.0, help="of the processor, that no run should exceed"
    )
    parser.add_argument("--runs", type=Path, default=RUNS_HOME)
    parser.add_argument("--judges", type=Path, default=JUDGES_HOME)
    arguments = parser.parse_args()
    device = open_device(arguments.device, arguments.threads)
    lab = prepare(arguments, device)
    trials = [
        measure(lab, arguments.methods, arguments.share, arguments.max_seconds, repeat)
        for repeat in range(arguments.repeats)
    ]
    rows = [row_of(name, [trial[name] for trial in trials]) for name in arguments.methods]
    report = {
        "benchmark": "synthesis",
        "hardware": device.name,
        "device": device.kind,
        "threads": device.threads,
        "precision": lab.plan.training.precision,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "dataset": f"{arguments.dataset}, run of alpha {arguments.alpha:g}, seed {arguments.seed}",
        "impressions": IMPRESSIONS,
        "share": arguments.share,
        "repeats": arguments.repeats,
        "accuracy_on_real_test_images": lab.accuracy,
        "rows": rows,
        "times_faster_than_deep_inversion": ratios(rows, "seconds"),
        "times_fewer_processor_seconds": ratios(rows, "processor_seconds"),
    }
    print(json.dumps(report))


def prepare(arguments: argparse.Namespace, device: ComputeDevice) -> Lab:
    """The global models of two successive rounds and the judges: made where they are missing."""
    run = lab_run(
        arguments.dataset, arguments.data, alpha=arguments.alpha, seed=arguments.seed, home=arguments.runs,
        device=arguments.device, threads=arguments.threads,
    )  # fmt: skip
    pooled = pooled_images(arguments.dataset, arguments.data)
    judges = tuple(open_judge(spec, pooled, device, arguments.judges) for spec in JUDGES)
    models = [run.model(run.plan.rounds - back, device) for back in (1, 0)]
    test = pooled.pooled_test
    pixels, labels = torch.from_numpy(test.images), torch.from_numpy(test.labels)
    accuracy = {
        "global model": round(accuracy_of(models[0], run.plan, pixels, labels, device), 4),
        **{judge.name: round(judge.judge(pixels, labels).recognised, 4) for judge in judges},
    }
    return Lab(run.plan, device, models[0], models[1], judges, accuracy)


def measure(
    lab: Lab, methods: Sequence[str], share: float, max_seconds: float, repeat: int
) -> dict[str, list[dict[str, Any]]]:
    """By method, its ladder of step counts up to the first that reaches the share."""
    generator = torch.Generator().manual_seed(7 + 1000 * repeat)
    sizes = class_sizes(IMPRESSIONS, lab.plan.model.classes, generator)
    labels = compose(sizes, None, 1, refresh=0.0, max_age_rounds=1, generator=generator).fresh
    found: dict[str, list[dict[str, Any]]] = {}
    for name in methods:
        options = METHODS[name]
        before = bank_of(lab, options, labels, repeat) if name.endswith("refresh") else None
        tried = found.setdefault(name, [])
        for steps in LADDERS[name]:
            if tried and tried[-1]["processor_seconds"] * steps / tried[-1]["steps"] > max_seconds:
                break
            began, processor_began = time.perf_counter(), time.process_time()
            if before is not None:
                images, seen = refreshed(lab, options, before, steps, repeat)
            else:
                images, seen = remade(lab, options, labels, steps, repeat), labels
            elapsed, worked = time.perf_counter() - began, time.process_time() - processor_began
            recognised = lab.recognised(images, seen)
            tried.append(
                {
                    "steps": steps,
                    "seconds": round(elapsed, 3),
                    "processor_seconds": round(worked, 3),
                    "recognised": round(statistics.fmean(recognised.values()), 4),
                    "by_judge": recognised,
                }
            )
            say(f"{repeat}: {name}: {tried[-1]}")
            if tried[-1]["recognised"] >= share:
                break
        tried[-1]["reached"] = tried[-1]["recognised"] >= share
    return found


def row_of(name: str, trials: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over repeats of what it took; None where a repeat never reached the share."""
    last = [tried[-1] for tried in trials]
    reached = all(trial["reached"] for trial in last)
    judged = [max(tried, key=lambda trial: trial["recognised"]) for tried in trials]
    return {
        "name": name,
        **{
            key: statistics.median(trial[key] for trial in last) if reached else None
            for key in ("seconds", "processor_seconds", "steps")
        },
        "best_recognised": [trial["recognised"] for trial in judged],
        "best_recognised_by_judge": [trial["by_judge"] for trial in judged],
        "repeats": trials,
    }


def ratios(rows: Sequence[dict[str, Any]], figure: str) -> dict[str, float | None]:
    """How many times less of a figure ours takes than DeepInversion; None where either never got there."""
    taken = {row["name"]: row[figure] for row in rows}
    baseline = taken.get("deep_inversion")
    return {
        name: round(baseline / taken[name], 2) if baseline and taken[name] else None
        for name in taken
        if name.endswith(("cold", "refresh"))
    }


def remade(lab: Lab, options: SynthesisOptions, labels: Tensor, steps: int, repeat: int) -> Tensor:
    """Pixels uint8 [M, C, H, W] after so many steps a pass from the options' start."""
    generator = torch.Generator().manual_seed(11 + 1000 * repeat)
    shape = (len(labels), *lab.plan.model.input)
    start = starting_images(options.start, shape, transforms.pixel_bounds(lab.plan), generator)
    (images,) = optimised(lab, lab.model, options, [(start, labels, steps)], generator)
    return transforms.to_pixels(images, lab.plan).cpu()


def refreshed(
    lab: Lab, options: SynthesisOptions, bank: Bank, steps: int, repeat: int
) -> tuple[Tensor, Tensor]:
    """Pixels and labels of a bank touched up a round later: new images get the default multiple of `steps`."""
    generator = torch.Generator().manual_seed(13 + 1000 * repeat)
    sizes = torch.bincount(bank.labels, minlength=lab.plan.model.classes).tolist()
    chosen: Composition = compose(
        sizes, bank, 2, refresh=options.refresh, max_age_rounds=options.max_age_rounds, generator=generator
    )
    shape = (len(chosen.fresh), *lab.plan.model.input)
    start = starting_images(options.start, shape, transforms.pixel_bounds(lab.plan), generator)
    old = bank[chosen.kept]
    parts = [
        (start, chosen.fresh, steps * COLD_STEPS // WARM_STEPS),
        (transforms.normalise(old.images, lab.plan), old.labels, steps),
    ]
    images = torch.cat(optimised(lab, lab.next_model, options, parts, generator))
    return transforms.to_pixels(images, lab.plan).cpu(), torch.cat([chosen.fresh, old.labels])


def bank_of(lab: Lab, options: SynthesisOptions, labels: Tensor, repeat: int) -> Bank:
    """The bank that these options leave behind a round earlier."""
    pixels = remade(lab, options, labels, options.planned_steps(warm=False), repeat)
    normal = transforms.normalise(pixels.to(lab.device.device), lab.plan)
    with torch.no_grad():
        features = lab.model.features(normal)
        return Bank.of(pixels, labels, torch.ones_like(labels), lab.model.head(features), features)


def optimised(
    lab: Lab,
    model: FederatedModel,
    options: SynthesisOptions,
    parts: Sequence[tuple[Tensor, Tensor, int]],
    generator: torch.Generator,
) -> list[Tensor]:
    """The images of each part after its steps."""
    where = lab.device.device
    low, high = transforms.pixel_bounds(lab.plan)
    optimiser = ImageOptimiser(
        model,
        options,
        bounds=(low.to(where), high.to(where)),
        generator=generator,
        autocast=lambda: lab.device.autocast(lab.plan.training.precision),
    )
    placed = [
        Part(images.to(where, memory_format=torch.channels_last), labels.to(where), steps)
        for images, labels, steps in parts
    ]
    return optimiser.optimise(placed, lambda done, total, loss: None)


@torch.no_grad()
def accuracy_of(
    net: FederatedModel, plan: Plan, pixels: Tensor, labels: Tensor, device: ComputeDevice
) -> float:
    """Share of images, uint8 NCHW or NHWC, that the net sees as their label."""
    right = 0
    for part, wanted in zip(torch.split(pixels, 512), torch.split(labels, 512), strict=True):
        seen = net(transforms.normalise(part.to(device.device), plan)).argmax(1).cpu()
        right += int((seen == wanted).sum())
    return right / len(labels)


def say(line: str) -> None:
    """Tell on stderr how far it has come."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
