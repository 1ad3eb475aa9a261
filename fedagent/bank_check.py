"""The check of a round's bank within training: the round's model gives the features, the job is told of progress."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from fedagent.image_distance import Tick
from fedagent.impression_bank import ResidentBank
from fedagent.impression_check import SitePictures, check_impressions
from fedagent.resident import ResidentImages
from fedcore.compute_worker import Job
from fedcore.data import transforms
from fedcore.device import ComputeDevice
from fedcore.impression_check import ImpressionCheck
from fedcore.models.base import FederatedModel
from fedcore.plan import Plan

STAGE = "checking impressions"
_PROGRESS_INTERVAL_S = 0.2
_MAX_BATCH = 256

# Gives what a site's images are compared by, the first time by work that `Tick` hears of.
PicturesOf = Callable[[Tick], SitePictures]


def checked(
    bank: ResidentBank,
    images: ResidentImages,
    model: FederatedModel,
    plan: Plan,
    device: ComputeDevice,
    *,
    pictures_of: PicturesOf,
    job: Job,
) -> tuple[ResidentBank | None, ImpressionCheck]:
    """The bank less what is refused, None if all is; and what the check found. `model` keeps mode and state.

    Raises Cancelled if the job is withdrawn.
    """
    tick = _ticking(job)
    pixels_MCHW, labels_M = bank.images.take(torch.arange(len(bank)))

    def features_of(pixels_BCHW: Tensor) -> Tensor:
        return _features(model, pixels_BCHW, plan, device, tick)

    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            passed_M, figures = check_impressions(
                pixels_MCHW, labels_M, images, pictures_of(tick), features_of, tick
            )
    finally:
        model.train(training)
    if bool(passed_M.all()):
        return bank, figures
    kept = passed_M.nonzero()[:, 0]
    return bank.chosen(kept) if len(kept) else None, figures


def _features(
    model: FederatedModel, pixels_BCHW: Tensor, plan: Plan, device: ComputeDevice, tick: Tick
) -> Tensor:
    """The model's features of pixels uint8, float32 [B, D] on the CPU."""
    parts = []
    # What fits in training, with gradients and as many impressions beside the images, fits here.
    step = min(_MAX_BATCH, 2 * plan.training.batch_size)
    for start in range(0, len(pixels_BCHW), step):
        tick(start, len(pixels_BCHW))
        pixels = pixels_BCHW[start : start + step].to(device.device)
        normalised = transforms.normalise(pixels, plan).contiguous(memory_format=torch.channels_last)
        with device.autocast(plan.training.precision):
            features = model.features(normalised)
        parts.append(features.float().cpu())
    return torch.cat(parts)


def _ticking(job: Job) -> Tick:
    """Progress a few times a second; ends the work when the job is withdrawn."""
    told = time.monotonic()

    def tick(done: int, total: int) -> None:
        nonlocal told
        job.check()
        now = time.monotonic()
        if now - told >= _PROGRESS_INTERVAL_S:
            told = now
            job.progress(stage=STAGE, done=done, total=total)

    return tick
