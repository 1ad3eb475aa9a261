"""Local training beside a bare PyTorch loop on the same net and images: one JSON object on stdout.

*Ours* is `fedagent.trainer.train` as a site runs it: reads the global model, trains, checks, writes the update, and
reports progress. *Bare* is what a data scientist would write by hand for the same work: the images as one uint8 tensor
on the device, a random order, the same normalisation, cross-entropy, SGD, precision and memory format; nothing is read,
checked or written. Both take turns, each timed whole, in processor seconds on a CPU (others may use the machine) and in
seconds on a GPU. `ratio` is bare over ours: 0.95 means that our training reaches 95 % of the bare loop's speed.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedagent.resident import ResidentImages
from fedagent.trainer import TrainRequest, train
from fedcore.compute_worker import Job
from fedcore.data import LabelledImages
from fedcore.device import ComputeDevice, open_device
from fedcore.models import build_model
from fedcore.models.state_file import save_state
from fedcore.plan import Plan, validate_plan

CLASSES = 8


def main() -> None:
    """Measure as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/bloodmnist_rebuilt.npz"))
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    asked = parser.parse_args()
    device = open_device(asked.device, asked.threads)
    images = read_images(asked.data, asked.images)
    plan = plan_of(asked.model, images, asked.batch_size, asked.precision)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(plan, images, device, Path(folder), asked.repeats)))


def read_images(path: Path, count: int) -> LabelledImages:
    """The first images of a file in MedMNIST's form; noise of the same form where there is none."""
    if path.exists():
        with np.load(path, allow_pickle=False) as file:
            images, labels = file["train_images"][:count], file["train_labels"][:count]
    else:
        draw = np.random.default_rng(0)
        images = draw.integers(0, 256, (count, 28, 28, 3), dtype=np.uint8)
        labels = draw.integers(0, CLASSES, (count, 1))
    return LabelledImages(images, labels.reshape(-1).astype(np.int64))


def plan_of(model: str, images: LabelledImages, batch_size: int, precision: str) -> Plan:
    """One epoch of plain FedAvg."""
    height, width, channels = images.images.shape[1:]
    return validate_plan(
        {
            "name": "training",
            "rounds": 1,
            "strategy": "fedavg",
            "model": {"name": model, "classes": CLASSES, "input": [channels, height, width]},
            "training": {"epochs": 1, "batch_size": batch_size, "precision": precision},
        }
    )


def measure(
    plan: Plan, images: LabelledImages, device: ComputeDevice, folder: Path, repeats: int
) -> dict[str, Any]:
    """Both loops in turn; the first pair warms up and does not count."""
    resident = ResidentImages.of(images, device)
    torch.manual_seed(0)
    start = folder / "model"
    save_state(start, build_model(plan.model).state_dict())
    request = TrainRequest(
        plan=plan, site="site", run="run", round=1, model=start, impressions=None, objective="cross_entropy",
        objective_options={}, local_tensors=(), state=folder / "state", out=folder / "update",
    )  # fmt: skip
    ours, bare = [], []
    for _ in range(repeats + 1):
        ours.append(timed(device, lambda: train(request, resident, device, Job(1, lambda message: None))))
        bare.append(timed(device, lambda: bare_loop(plan, resident, device)))
    ours, bare = ours[1:], bare[1:]
    per_s = len(resident) * plan.training.epochs
    return {
        "benchmark": "training",
        "model": plan.model.name,
        "images": len(resident),
        "batch_size": plan.training.batch_size,
        "precision": plan.training.precision,
        "ours_s": {"median": round(statistics.median(ours), 4), "all": [round(s, 4) for s in ours]},
        "bare_s": {"median": round(statistics.median(bare), 4), "all": [round(s, 4) for s in bare]},
        "ours_images_per_s": round(per_s / statistics.median(ours), 1),
        "bare_images_per_s": round(per_s / statistics.median(bare), 1),
        "ratio": round(statistics.median(b / o for b, o in zip(bare, ours, strict=True)), 4),
        "hardware": f"{device.name}, {device.threads} threads, torch {torch.__version__}",
    }


def timed(device: ComputeDevice, work: Any) -> float:
    """Seconds that the work took: of the processor on a CPU, on the wall on a GPU."""
    clock = time.perf_counter if device.is_cuda else time.process_time
    began = clock()
    work()
    if device.is_cuda:
        torch.cuda.synchronize()
    return clock() - began


def bare_loop(plan: Plan, images: ResidentImages, device: ComputeDevice) -> float:
    """An epoch as one writes it by hand; returns the mean loss."""
    model = device.place(build_model(plan.model)).train()
    training = plan.training
    optimiser = torch.optim.SGD(model.parameters(), lr=training.learning_rate, momentum=training.momentum)
    mean, std = (torch.tensor(v, device=device.device).view(1, -1, 1, 1) for v in (plan.mean, plan.std))
    pixels, labels = images.images, images.labels
    total = torch.zeros((), device=device.device)
    for indices in torch.randperm(len(images)).split(training.batch_size):
        batch = pixels[indices].to(memory_format=torch.channels_last)
        batch = (batch.float() / 255 - mean) / std
        with device.autocast(training.precision):
            loss: Tensor = F.cross_entropy(model(batch), labels[indices])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        total += loss.detach()
    return float(total)


if __name__ == "__main__":
    main()
