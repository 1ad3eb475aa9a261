# ruff: noqa: N803, N806 - shape suffixes
"""What the stored BatchNorm statistics of a merged model cost: accuracy with them, and with those of real images.

A run (`lab.py`) is trained once. Then, round by round, nothing is trained anew, only what the BatchNorm layers have
stored changes: as merged; by site (each site passes its own training images through the merged model, layers normalised
by what they see, and means and variances are pooled as merging does it); pooled (all sites' images in one pass, which
only a lab can do). Prints one JSON object: accuracy and balanced accuracy on the pooled test images.

Legend: N images, C channels, H x W pixels.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from judge import DATA
from lab import HOME, LabRun, lab_run
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fedcore.data import transforms
from fedcore.data.dataset import LabelledImages
from fedcore.device import ComputeDevice, open_device
from fedcore.models.base import batch_norm_layers
from fedcore.norm_statistics import statistic_names
from fedserver.aggregation import normalised
from fedserver.statistics_pool import pooled

State = dict[str, Tensor]


def main() -> None:
    """Run as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="bloodmnist")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--rounds", type=int, nargs="+", help="the last five by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=HOME)
    asked = parser.parse_args()
    device = open_device(asked.device, asked.threads)
    run = lab_run(
        asked.dataset, asked.data, alpha=asked.alpha, seed=asked.seed, home=asked.runs,
        device=asked.device, threads=asked.threads,
    )  # fmt: skip
    last = run.plan.rounds
    rows = []
    for number in asked.rounds or range(max(1, last - 4), last + 1):
        rows.append({"round": number, **calibrated(run, number, device)})
        print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": "calibration", "alpha": asked.alpha, "seed": asked.seed, "rows": rows}))


def calibrated(run: LabRun, number: int, device: ComputeDevice) -> dict[str, tuple[float, float]]:
    """(Accuracy, balanced accuracy) of a round's model by whose statistics its layers hold."""
    sites = [_images(run, site.train, device) for site in run.federation.sites.values()]
    merged = run.state(number)
    states = {
        "as_merged": merged,
        "by_site": merged
        | pooled(
            [statistics(run, number, images, device) for images in sites],
            normalised([len(images) for images in sites]),
        ),
        "pooled": merged | statistics(run, number, torch.cat(sites), device),
    }
    return {name: accuracies(run, number, state, device) for name, state in states.items()}


@torch.no_grad()
def statistics(run: LabRun, number: int, images_NCHW: Tensor, device: ComputeDevice) -> State:
    """Means and variances [C] of what each BatchNorm layer sees of images, the layers before it normalising by it too."""
    net = run.model(number, device)
    for layer in (m for m in net.modules() if isinstance(m, _BatchNorm)):
        layer.train().momentum = 1.0
    net.features(images_NCHW)
    state = net.state_dict()
    return {name: state[name] for layer in batch_norm_layers(net) for name in statistic_names(layer)}


@torch.no_grad()
def accuracies(run: LabRun, number: int, state: State, device: ComputeDevice) -> tuple[float, float]:
    """Accuracy and balanced accuracy, on the pooled test images, of the round's model with these tensors."""
    net = run.model(number, device)
    net.load_state_dict(state)
    test = run.federation.pooled_test
    labels_N = torch.from_numpy(test.labels)
    seen_N = torch.cat([net(part).argmax(1).cpu() for part in torch.split(_images(run, test, device), 512)])
    right_N = (seen_N == labels_N).double()
    recalls = [right_N[labels_N == k].mean() for k in labels_N.unique()]
    return round(float(right_N.mean()), 4), round(float(torch.stack(recalls).mean()), 4)


def _images(run: LabRun, images: LabelledImages, device: ComputeDevice) -> Tensor:
    normal = transforms.normalise(torch.from_numpy(images.images).to(device.device), run.plan)
    return normal.contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    main()
