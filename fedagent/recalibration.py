"""What a model's BatchNorm layers see of a site's training images.

Legend: N images, C channels, H x W pixels.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedagent.batches import batch_bounds
from fedagent.resident import ResidentImages
from fedcore.compute_worker import Job
from fedcore.data import transforms
from fedcore.errors import DataError, LearningError
from fedcore.models.base import FederatedModel, batch_norm_layers
from fedcore.norm_statistics import statistic_names
from fedcore.plan import Plan

PROGRESS_INTERVAL_S = 0.2
# Training batches that are measured as one: the more images a batch has, the nearer its statistics are to those of all.
# Without a gradient no activation outlives its layer, so that it takes about the memory of training in bf16.
_BATCHES_AT_ONCE = 2


@dataclass(slots=True)
class _Seen:
    """Mean [C] and population variance [C], float64, of the `count` values a channel that a layer has seen."""

    count: int
    mean: Tensor
    variance: Tensor

    def add(self, count: int, mean_C: Tensor, variance_C: Tensor) -> None:
        """Pool with a batch's: the variance holds the spread of the two means (law of total variance)."""
        total = self.count + count
        share = count / total
        apart_C = mean_C - self.mean
        self.mean += share * apart_C
        self.variance = (
            (1 - share) * self.variance + share * variance_C + share * (1 - share) * apart_C.square()
        )
        self.count = total


def measure_statistics(
    model: FederatedModel,
    images: ResidentImages,
    plan: Plan,
    job: Job,
    who: str,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Mean and population variance [C], float32 on the CPU, of what each BatchNorm layer sees of the training images.

    One pass without a gradient, augmentation or dropout, in float32, in an order that `generator` draws: a site's folders
    come class by class, and a batch of one class is normalised as none is in training. Every layer is normalised by what it
    sees of the batch, as in training, so the layers behind it see what they would with these statistics; the batches'
    statistics are pooled by size, the spread of their means included. A batch is a few of training. `model` is left with
    the statistics of the last one. `who` begins messages.

    Ends within a batch when the job is cancelled. Raises DataError if there is no image, LearningError if a statistic is
    not finite. Source: Wu & Johnson 2021, Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 3.1 (PreciseBN).
    """
    if not len(images):
        raise DataError(f"{who}: there are no training images", hint="check [data] in agent.toml")
    layers = batch_norm_layers(model)
    seen: dict[str, _Seen] = {}
    hooks = [layer.register_forward_pre_hook(_watch(name, seen)) for name, layer in layers.items()]
    try:
        _pass_all(model.eval(), images, plan, job, generator)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[str, Tensor] = {}
    for layer, statistics in seen.items():
        for name, value_C in zip(statistic_names(layer), (statistics.mean, statistics.variance), strict=True):
            found[name] = value_C.float().cpu()
            if not bool(torch.isfinite(found[name]).all()):
                raise LearningError(
                    f"{who}: statistic '{name}' holds NaN or Inf", hint="lower training.learning_rate"
                )
    return found


def _watch(name: str, seen: dict[str, _Seen]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that notes what a layer in inference mode is about to see, and has it normalise by that."""

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (values_NCHW,) = inputs
        every_but_C = [axis for axis in range(values_NCHW.dim()) if axis != 1]
        variance_C, mean_C = torch.var_mean(values_NCHW, every_but_C, correction=0)
        assert isinstance(layer.running_mean, Tensor)
        assert isinstance(layer.running_var, Tensor)
        layer.running_mean.copy_(mean_C)
        layer.running_var.copy_(variance_C)
        count, mean_C, variance_C = values_NCHW.numel() // len(mean_C), mean_C.double(), variance_C.double()
        if name in seen:
            seen[name].add(count, mean_C, variance_C)
        else:
            seen[name] = _Seen(count, mean_C, variance_C)

    return note


@torch.no_grad()
def _pass_all(
    model: FederatedModel, images: ResidentImages, plan: Plan, job: Job, generator: torch.Generator
) -> None:
    began = told = time.monotonic()
    order_N = torch.randperm(len(images), generator=generator)
    bounds = batch_bounds(len(images), _BATCHES_AT_ONCE * max(2, plan.training.batch_size))
    job.progress(stage="recalibrating", done=0, total=len(bounds), images_per_s=0.0)
    for number, (start, stop) in enumerate(bounds, 1):
        job.check()
        pixels_NCHW, _ = images.take(order_N[start:stop])
        model.features(transforms.normalise(pixels_NCHW, plan).contiguous(memory_format=torch.channels_last))
        now = time.monotonic()
        if now - told >= PROGRESS_INTERVAL_S or number == len(bounds):
            told = now
            speed = round(stop / max(now - began, 1e-9), 1)
            job.progress(stage="recalibrating", done=number, total=len(bounds), images_per_s=speed)
