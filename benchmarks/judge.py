# ruff: noqa: N803, N806 - shape suffixes
"""Judges of impressions: nets of other architectures than the global model's, trained on pooled real images.

For the lab only: no coordinator has such images. The two of `JUDGES` take part in no choice: neither their seeds nor
their architectures are used anywhere else. `PRACTICE`, of another seed and width, is what settings are
chosen with. A judge is trained once and kept in a folder that git ignores.

Legend: N images, C channels, H x W pixels, K classes, D features.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fedcore.data import transforms
from fedcore.data.benchmark_sets import Federation, load_benchmark
from fedcore.device import ComputeDevice, open_device
from fedcore.models import build_model
from fedcore.models.base import FederatedModel
from fedcore.models.state_file import load_tensors, save_state
from fedcore.plan import Plan, validate_plan

HOME = Path(".bench/judges")
DATA = Path("../shared/data/bloodmnist_rebuilt.npz")
BATCH, LEARNING_RATE, WEIGHT_DECAY = 64, 2e-3, 0.02
# Blood cells have no up or down.
AUGMENT = ("rot90", "hflip", "shift")


@dataclass(frozen=True, slots=True)
class JudgeSpec:
    """What a judge is. Images are enlarged to `side` pixels, bilinearly, where that is not their own size."""

    name: str
    model: str
    norm: str
    options: tuple[tuple[str, int], ...]
    side: int
    seed: int
    epochs: int


JUDGES = (
    JudgeSpec("resnet18", "resnet18", "batch", (("width", 12),), 28, seed=71_001, epochs=6),
    JudgeSpec("alexnet_bn", "alexnet_bn", "batch", (("hidden", 256),), 64, seed=72_002, epochs=6),
)
PRACTICE = JudgeSpec("practice", "resnet18", "batch", (("width", 8),), 28, seed=73_003, epochs=5)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of labelled images.

    `recognised` is the share that it sees as their label, `by_class` the same for each class (None without images of
    it), `spread` the mean over classes of the mean Euclidean distance of two different images' features.
    """

    recognised: float
    by_class: list[float | None]
    spread: float


class Judge:
    """A trained net that answers to pixels."""

    def __init__(self, spec: JudgeSpec, plan: Plan, net: FederatedModel, device: ComputeDevice) -> None:
        self.spec = spec
        self._plan = plan
        self._net = net
        self._device = device

    @property
    def name(self) -> str:
        """How tables call it."""
        return self.spec.name

    @torch.no_grad()
    def answers(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, K] and features [N, D], on the CPU, of pixels uint8 [N, C, H, W] or [N, H, W, C]."""
        logits, features = [], []
        for part in torch.split(pixels, 512):
            features_ND = self._net.features(seen_by(self.spec, self._plan, part.to(self._device.device)))
            features.append(features_ND.cpu())
            logits.append(self._net.head(features_ND).cpu())
        return torch.cat(logits), torch.cat(features)

    def judge(self, pixels: Tensor, labels_N: Tensor) -> Verdict:
        """Its verdict on pixels with the labels that they should show."""
        logits_NK, features_ND = self.answers(pixels)
        right_N = (logits_NK.argmax(1) == labels_N).float()
        by_class = [
            round(float(right_N[labels_N == k].mean()), 4) if bool((labels_N == k).any()) else None
            for k in range(logits_NK.shape[1])
        ]
        return Verdict(float(right_N.mean()), by_class, spread_within_classes(features_ND, labels_N))


def spread_within_classes(features_ND: Tensor, labels_N: Tensor) -> float:
    """Mean over classes of the mean distance of two different images; NaN where no class has two."""
    means = []
    for k in labels_N.unique():
        own_MD = features_ND[labels_N == k].double()
        if len(own_MD) > 1:
            means.append(torch.pdist(own_MD).mean())
    return float(torch.stack(means).mean()) if means else float("nan")


def seen_by(spec: JudgeSpec, plan: Plan, pixels: Tensor) -> Tensor:
    """Pixels as the net of `spec` takes them: normalised, enlarged, channels last."""
    images_NCHW = transforms.normalise(pixels, plan)
    if images_NCHW.shape[-1] != spec.side:
        images_NCHW = F.interpolate(
            images_NCHW, size=(spec.side, spec.side), mode="bilinear", align_corners=False
        )
    return images_NCHW.contiguous(memory_format=torch.channels_last)


def open_judge(spec: JudgeSpec, pooled: Federation, device: ComputeDevice, home: Path = HOME) -> Judge:
    """The judge of `spec` from the folder `home`, or trained now on the training images of all of `pooled`'s sites."""
    said = json.dumps([asdict(spec), pooled.dataset, pooled.data_sha256, pooled.max_train])
    path = home / f"{spec.name}-{hashlib.sha256(said.encode()).hexdigest()[:12]}.safetensors"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        save_state(path, train(spec, pooled, device).state_dict())
    net = build_model(_plan(spec, pooled, spec.side).model)
    net.load_state_dict(load_tensors(path))
    plan = _plan(spec, pooled, pooled.input[1])
    return Judge(spec, plan, device.place(net).eval().requires_grad_(False), device)


def train(spec: JudgeSpec, pooled: Federation, device: ComputeDevice) -> FederatedModel:
    """A net trained on all sites' training images together: AdamW, half a cosine, augmented, in bf16."""
    plan = _plan(spec, pooled, pooled.input[1])
    torch.manual_seed(spec.seed)
    generator = torch.Generator().manual_seed(spec.seed)
    net = device.place(build_model(_plan(spec, pooled, spec.side).model)).train()
    parts = [site.train for site in pooled.sites.values()]
    images = torch.cat([torch.from_numpy(part.images) for part in parts])
    labels_N = torch.cat([torch.from_numpy(part.labels) for part in parts])
    optimiser = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, spec.epochs * -(-len(labels_N) // BATCH))
    for epoch in range(1, spec.epochs + 1):
        for indices in torch.split(torch.randperm(len(labels_N), generator=generator), BATCH):
            pixels = images[indices].to(device.device)
            seen_NCHW = transforms.augment(seen_by(spec, plan, pixels), AUGMENT, generator)
            with device.autocast("bf16"):
                features_ND = net.features(seen_NCHW.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(net.head(features_ND.float()), labels_N[indices].to(device.device))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        print(f"judge {spec.name}: epoch {epoch} of {spec.epochs}", file=sys.stderr, flush=True)
    return net


def pooled_images(dataset: str, data: Path) -> Federation:
    """All images of a data set at one site: what judges learn from."""
    return load_benchmark(dataset, data, sites=1, seed=0)


def _plan(spec: JudgeSpec, pooled: Federation, side: int) -> Plan:
    """A plan whose model is the judge's, for images of `side` pixels: it carries the normalisation too."""
    return validate_plan(
        {
            "name": f"judge-{spec.name}",
            "rounds": 1,
            "strategy": "fedavg",
            "model": {
                "name": spec.model,
                "norm": spec.norm,
                "options": dict(spec.options),
                "classes": len(pooled.class_names),
                "input": [pooled.input[0], side, side],
            },
        }
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what judges are missing; their accuracy on the pooled test images as one JSON object on stdout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="bloodmnist")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--home", type=Path, default=HOME)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--practice", action="store_true", help="only the one that settings are chosen with")
    asked = parser.parse_args(arguments)
    device = open_device(asked.device, asked.threads)
    pooled = pooled_images(asked.dataset, asked.data)
    test = pooled.pooled_test
    pixels, labels_N = torch.from_numpy(test.images), torch.from_numpy(test.labels)
    specs = (PRACTICE,) if asked.practice else JUDGES
    verdicts = {
        s.name: asdict(open_judge(s, pooled, device, asked.home).judge(pixels, labels_N)) for s in specs
    }
    print(json.dumps({"benchmark": "judge", "dataset": pooled.description, "real test images": verdicts}))


if __name__ == "__main__":
    main()
