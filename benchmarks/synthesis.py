"""How long until impressions are worth something: one JSON object on stdout.

Seconds until an independent judge, a net of another architecture trained on pooled real images, recognises a
share (0.70) of a class-balanced bank of 160 impressions, same global model and device, for

* `deep_inversion`: Adam from white noise with BatchNorm statistics, total variation, jitter and flips (Yin et al.
  2020), remade from nothing;
* `cold`: our defaults, without a bank;
* `refresh`: our defaults a round later: the bank of `cold` and the next round's global model;
* `published`: the published loop of FedImpres (a row without a ratio).

For each, runs of growing step counts are timed alone, each from its start; the first that reaches the share counts.
The global model is that of logit-adjusted FedAvg over 8 sites, Dirichlet 1.0 unless told otherwise. It and the judge
are made once and kept under `.bench/`. The judge is for the lab: it sees real images that no coordinator has.
"""

import argparse
import hashlib
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fedsim
from fedcore.data import transforms
from fedcore.data.benchmark_sets import Federation, load_benchmark
from fedcore.device import ComputeDevice, open_device
from fedcore.models import build_model
from fedcore.models.base import FederatedModel
from fedcore.models.state_file import load_tensors, save_state
from fedcore.plan import Plan, validate_plan
from fedserver.strategies.fedimpres_paper import FedImpresPaperOptions
from fedserver.synthesis.bank import Bank, Composition, class_sizes, compose
from fedserver.synthesis.optimise import ImageOptimiser, Part
from fedserver.synthesis.options import COLD_STEPS, WARM_STEPS, SynthesisOptions
from fedserver.synthesis.start import starting_images

IMPRESSIONS = 160
DEEP_INVERSION = SynthesisOptions(
    start="white", image_lr=0.05, stationarity=0.0, batch_norm=0.1, total_variation=0.05, l2=1e-4, jitter=2, flip=True,
    warm_start=False, gate=False,
)  # fmt: skip
LADDERS = {
    "cold": (10, 20, 40, 60, COLD_STEPS, 200),
    "refresh": (1, 2, 5, 10, WARM_STEPS, 2 * WARM_STEPS),
    "deep_inversion": (50, 100, 200, 400, 800, 1600),
    "published": (10,),
}


@dataclass(frozen=True, slots=True)
class Lab:
    """Two successive global models, the judge and what it takes to use them."""

    plan: Plan
    device: ComputeDevice
    model: FederatedModel
    next_model: FederatedModel
    judge: FederatedModel
    accuracy: dict[str, float | None]


def main() -> None:
    """Run the benchmark as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="bloodmnist")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/bloodmnist_rebuilt.npz"))
    parser.add_argument("--max-train", type=int, default=3000)
    parser.add_argument(
        "--alpha", type=float, default=1.0, help="skew of the sites that made the global model"
    )
    parser.add_argument("--rounds", type=int, default=12, help="rounds that the global model has had")
    parser.add_argument("--judge-epochs", type=int, default=10)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--share", type=float, default=0.70, help="of the bank, that the judge must recognise"
    )
    parser.add_argument("--max-seconds", type=float, default=300.0, help="no run longer than about this")
    parser.add_argument("--home", type=Path, default=Path(".bench/synthesis"))
    arguments = parser.parse_args()
    device = open_device(arguments.device, arguments.threads)
    lab = prepare(arguments, device)
    rows = measure(lab, arguments.share, arguments.max_seconds)
    seconds = {row["name"]: row["seconds"] for row in rows}
    baseline = seconds["deep_inversion"]
    print(
        json.dumps(
            {
                "benchmark": "synthesis",
                "hardware": device.name,
                "device": device.kind,
                "threads": device.threads,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "dataset": f"{arguments.dataset}, {arguments.max_train} images, alpha {arguments.alpha}, 8 sites",
                "impressions": IMPRESSIONS,
                "share": arguments.share,
                **lab.accuracy,
                "rows": rows,
                "times_faster_than_deep_inversion": {
                    name: round(baseline / seconds[name], 2) if baseline and seconds[name] else None
                    for name in ("cold", "refresh")
                },
            }
        )
    )


def prepare(arguments: argparse.Namespace, device: ComputeDevice) -> Lab:
    """Train, or read from the home, the global models of two successive rounds and the judge."""
    federation = load_benchmark(
        arguments.dataset,
        arguments.data,
        sites=8,
        alpha=arguments.alpha,
        seed=0,
        max_train=arguments.max_train,
    )
    plan = plan_of(federation, arguments.rounds)
    setting = [arguments.dataset, arguments.max_train, arguments.alpha, arguments.judge_epochs, device.kind]
    text = json.dumps([*setting, plan.to_json()])
    home = arguments.home / hashlib.sha256(text.encode()).hexdigest()[:12]
    home.mkdir(parents=True, exist_ok=True)
    paths = [home / f"round-{number}.safetensors" for number in (plan.rounds - 1, plan.rounds)]
    if not all(path.exists() for path in paths):
        train_globals(plan, federation, paths, arguments)
    judge_plan = plan.model_copy(update={"model": judge_section(plan)})
    judge_path = home / "judge.safetensors"
    if not judge_path.exists():
        say(f"training the judge, {arguments.judge_epochs} epochs")
        save_state(
            judge_path, train_judge(judge_plan, federation, arguments.judge_epochs, device).state_dict()
        )
    models = [frozen(plan, path, device) for path in paths]
    judge = frozen(judge_plan, judge_path, device)
    test = federation.pooled_test
    accuracy = {
        name: round(score(net, plan, torch.from_numpy(test.images), torch.from_numpy(test.labels), device), 4)
        for name, net in (("model_accuracy", models[0]), ("judge_accuracy", judge))
    }
    return Lab(plan, device, models[0], models[1], judge, dict(accuracy))


def plan_of(federation: Federation, rounds: int) -> Plan:
    """Logit-adjusted FedAvg: our strategy, which never comes to making impressions."""
    return validate_plan(
        {
            "name": "bench",
            "rounds": rounds + 1,
            "strategy": "fedimpres",
            "model": {
                "name": "cnn",
                "classes": len(federation.class_names),
                "input": list(federation.input),
            },
            "training": {"epochs": 3, "batch_size": 32, "learning_rate": 0.02, "momentum": 0.9},
            "synthesis": {"warmup_rounds": 10_000, "images": IMPRESSIONS},
        }
    )


def judge_section(plan: Plan) -> Any:
    """Another architecture than the global model's: GroupNorm, narrower, a finer grid of averages."""
    return plan.model.model_copy(update={"norm": "group", "options": {"width": 24, "grid": 3}})


def train_globals(
    plan: Plan, federation: Federation, paths: Sequence[Path], arguments: argparse.Namespace
) -> None:
    """Run the federation and keep the models of its last two rounds."""

    def keep(record: Any, model: Path) -> None:
        say(f"global model, round {record.round} of {plan.rounds}: accuracy {record.accuracy:.3f}")
        if record.round > plan.rounds - len(paths):
            path = paths[record.round - plan.rounds - 1]
            path.write_bytes(model.read_bytes())

    result = fedsim.run(plan, federation, threads=arguments.threads, device=arguments.device, on_round=keep)
    if result.state != "DONE":
        raise SystemExit(f"the federation ended {result.state}: {result.reason}")


def train_judge(plan: Plan, federation: Federation, epochs: int, device: ComputeDevice) -> FederatedModel:
    """A net trained on all sites' real images together, Adam, one cycle of a cosine."""
    torch.manual_seed(1234)
    model = device.place(build_model(plan.model)).train()
    images = torch.cat([torch.from_numpy(site.train.images) for site in federation.sites.values()])
    labels = torch.cat([torch.from_numpy(site.train.labels) for site in federation.sites.values()])
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = epochs * -(-len(labels) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, batches)
    for _ in range(epochs):
        for indices in torch.split(torch.randperm(len(labels)), 64):
            normal = transforms.normalise(images[indices].to(device.device), plan)
            loss = F.cross_entropy(model(normal), labels[indices].to(device.device))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return model


def measure(lab: Lab, share: float, max_seconds: float) -> list[dict[str, Any]]:
    """A row a method: its ladder of step counts up to the first that reaches the share."""
    classes = lab.plan.model.classes
    generator = torch.Generator().manual_seed(7)
    labels = compose(
        class_sizes(IMPRESSIONS, classes, generator),
        None,
        1,
        refresh=0.0,
        max_age_rounds=1,
        generator=generator,
    ).fresh
    ours = SynthesisOptions()
    cold_bank = bank_of(lab, ours, labels)
    rows = []
    for name, ladder in LADDERS.items():
        tried: list[dict[str, Any]] = []
        options = {"deep_inversion": DEEP_INVERSION, "published": FedImpresPaperOptions()}.get(name, ours)
        for steps in ladder:
            if tried and tried[-1]["seconds"] * steps / tried[-1]["steps"] > max_seconds:
                break
            began = time.perf_counter()
            if name == "refresh":
                images, seen = refreshed(lab, options, cold_bank, steps)
            else:
                images, seen = remade(lab, options, labels, steps), labels
            elapsed = time.perf_counter() - began
            recognised = score(lab.judge, lab.plan, images, seen, lab.device)
            tried.append({"steps": steps, "seconds": round(elapsed, 3), "recognised": round(recognised, 4)})
            say(f"{name}: {tried[-1]}")
            if recognised >= share:
                break
        reached = tried[-1] if tried[-1]["recognised"] >= share else None
        rows.append(
            {
                "name": name,
                "seconds": reached["seconds"] if reached else None,
                "steps": reached["steps"] if reached else None,
                "best_recognised": max(t["recognised"] for t in tried),
                "tried": tried,
            }
        )
    return rows


def remade(lab: Lab, options: SynthesisOptions, labels: Tensor, steps: int) -> Tensor:
    """Pixels uint8 [M, C, H, W] after so many steps a pass from the options' start."""
    generator = torch.Generator().manual_seed(11)
    shape = (len(labels), *lab.plan.model.input)
    start = starting_images(options.start, shape, transforms.pixel_bounds(lab.plan), generator)
    (images,) = optimised(lab, lab.model, options, [(start, labels, steps)], generator)
    return transforms.to_pixels(images, lab.plan).cpu()


def refreshed(lab: Lab, options: SynthesisOptions, bank: Bank, steps: int) -> tuple[Tensor, Tensor]:
    """Pixels and labels of a bank touched up a round later: new images get the default multiple of `steps`."""
    generator = torch.Generator().manual_seed(13)
    sizes = class_sizes(IMPRESSIONS, lab.plan.model.classes, torch.Generator().manual_seed(7))
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


def bank_of(lab: Lab, options: SynthesisOptions, labels: Tensor) -> Bank:
    """The bank that our defaults leave behind a round earlier."""
    pixels = remade(lab, options, labels, options.planned_steps(warm=False))
    normal = transforms.normalise(pixels.to(lab.device.device), lab.plan)
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
    optimiser = ImageOptimiser(model, options, bounds=(low.to(where), high.to(where)), generator=generator)
    placed = [
        Part(images.to(where, memory_format=torch.channels_last), labels.to(where), steps)
        for images, labels, steps in parts
    ]
    return optimiser.optimise(placed, lambda done, total, loss: None)


@torch.no_grad()
def score(net: nn.Module, plan: Plan, pixels: Tensor, labels: Tensor, device: ComputeDevice) -> float:
    """Share of images, uint8 NCHW or NHWC, that the net sees as their label."""
    right = 0
    for part, wanted in zip(torch.split(pixels, 512), torch.split(labels, 512), strict=True):
        seen = net(transforms.normalise(part.to(device.device), plan)).argmax(1).cpu()
        right += int((seen == wanted).sum())
    return right / len(labels)


def frozen(plan: Plan, path: Path, device: ComputeDevice) -> FederatedModel:
    """A model from its file, in eval mode."""
    model = build_model(plan.model)
    model.load_state_dict(load_tensors(path))
    return device.place(model).eval().requires_grad_(False)


def say(line: str) -> None:
    """Tell on stderr how far it has come."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
