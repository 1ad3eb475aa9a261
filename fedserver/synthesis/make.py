"""From a global model to a bank: what is kept, starts, optimisation, pixels, the gate.

Legend: M images, C channels, H x W pixels.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fedcore.compute_worker import Job
from fedcore.data import transforms
from fedcore.device import ComputeDevice
from fedcore.errors import LearningError, PlanError
from fedcore.models import build_model
from fedcore.models.base import FederatedModel
from fedcore.plan import Plan
from fedcore.seeding import derive_seed
from fedserver.synthesis.bank import Bank, class_sizes, compose
from fedserver.synthesis.gate import Verdict, inspect
from fedserver.synthesis.optimise import ImageOptimiser, Part
from fedserver.synthesis.options import SynthesisOptions
from fedserver.synthesis.start import Style, public_images, starting_images

PROGRESS_INTERVAL_S = 0.2


@dataclass(frozen=True, slots=True)
class Made:
    """A round's bank and how it came about. `verdict` is None where the gate was off."""

    bank: Bank
    kept: int
    fresh: int
    # Steps in a pass for new images and for those of the bank before.
    steps: tuple[int, int]
    verdict: Verdict | None
    note: str

    @property
    def figures(self) -> dict[str, int | float]:
        """Counts for the record; `rejected_share` is of all images that were made."""
        verdict = self.verdict
        rejected = verdict.rejected if verdict else 0
        return {
            "kept": self.kept,
            "fresh": self.fresh,
            "steps_fresh": self.steps[0],
            "steps_kept": self.steps[1],
            "rejected": rejected,
            "rejected_share": rejected / max(1, self.kept + self.fresh),
            "unrecognised": verdict.unrecognised if verdict else 0,
            "unlikely": verdict.unlikely if verdict else 0,
            "duplicates": verdict.duplicates if verdict else 0,
        }


def check_synthesis(plan: Plan, model: FederatedModel, options: SynthesisOptions) -> None:
    """Check, before a run starts, that this model can be inverted as the plan asks. Raises PlanError."""
    if not isinstance(getattr(model, "head", None), torch.nn.Linear):
        raise PlanError(
            f"strategy '{plan.strategy}': model '{plan.model.name}' has no linear head, impressions need one",
            hint="choose another model, or a strategy without impressions",
        )
    outputs = model.head.out_features
    if plan.model.classes > outputs:
        raise PlanError(
            f"model.classes is {plan.model.classes}, the head of '{plan.model.name}' has {outputs} outputs:"
            " impressions can't be made of a class that it does not know"
        )
    if options.batch_norm and not has_statistics(model):
        raise PlanError(
            f"strategy_options.batch_norm is {options.batch_norm}, but '{plan.model.name}' with norm ="
            f" '{plan.model.norm}' has no BatchNorm statistics to match",
            hint='leave batch_norm out, or set model.norm = "batch"',
        )
    if options.start_images is not None:
        _, height, width = plan.model.input
        public_images(Path(options.start_images), (plan.model.input[0], height, width))


def has_statistics(model: torch.nn.Module) -> bool:
    """Whether a layer of the model is a BatchNorm that keeps statistics."""
    return any(isinstance(m, _BatchNorm) and m.running_mean is not None for m in model.modules())


def make_bank(
    plan: Plan,
    round_number: int,
    state: Mapping[str, Tensor],
    options: SynthesisOptions,
    *,
    device: ComputeDevice,
    job: Job,
    previous: Bank | None = None,
    last_state: Mapping[str, Tensor] | None = None,
) -> Made:
    """Make up to `plan.synthesis.images` impressions from the global model `state` of a round.

    `previous` is the bank before, warm-started from; `last_state` the last round's global model, which the
    disagreement term needs. The same arguments give the same bank on the CPU with the same threads, unless a
    time budget is set. Raises LearningError if the loss stops being finite, no image passes the gate or the
    device fails; PlanError, as `check_synthesis`; Cancelled if the job is withdrawn.
    """
    model = _frozen(plan, state, device)
    check_synthesis(plan, model, options)
    usable = previous if options.warm_start and _suits(previous, plan) else None
    generator = _generator(plan, "impressions", round_number)
    composition = compose(
        class_sizes(plan.synthesis.images, plan.model.classes, _generator(plan, "bank classes", 0)),
        usable,
        round_number,
        refresh=options.refresh,
        max_age_rounds=options.max_age_rounds,
        generator=generator,
    )
    fresh_labels = composition.fresh
    bounds = transforms.pixel_bounds(plan)
    parts = [
        Part(
            _start(plan, options, fresh_labels, bounds, generator),
            fresh_labels,
            options.planned_steps(warm=False),
        )
    ]
    labels_M, born_M = fresh_labels, torch.full((len(fresh_labels),), round_number, dtype=torch.int64)
    if usable is not None:
        old = usable[composition.kept]
        labels_M, born_M = torch.cat([labels_M, old.labels]), torch.cat([born_M, old.born])
        warm = transforms.normalise(old.images, plan)
        parts.append(Part(warm, old.labels, options.planned_steps(warm=True)))
    try:
        last_model = None
        if options.disagreement and last_state is not None:
            last_model = _frozen(plan, last_state, device)
        optimiser = ImageOptimiser(
            model,
            options,
            bounds=(bounds[0].to(device.device), bounds[1].to(device.device)),
            generator=generator,
            last_model=last_model,
            autocast=lambda: device.autocast(plan.training.precision),
        )
        parts = [_placed(part, device) for part in parts]
        if options.time_budget_s is not None:
            steps = optimiser.affordable(parts, options.time_budget_s)
            parts = [Part(part.images, part.labels, count) for part, count in zip(parts, steps, strict=True)]
        images_MCHW = torch.cat(optimiser.optimise(parts, _Reporter(job)))
        pixels_MCHW = transforms.to_pixels(images_MCHW, plan)
        return _checked(plan, model, pixels_MCHW, labels_M, born_M, options, parts)
    except RuntimeError as error:
        # torch's own: out of memory, a CUDA fault, a plug-in's model that can't be differentiated.
        raise LearningError(f"round {round_number}: synthesis failed: {error}") from error


@torch.no_grad()
def _checked(
    plan: Plan,
    model: FederatedModel,
    pixels_MCHW: Tensor,
    labels_M: Tensor,
    born_M: Tensor,
    options: SynthesisOptions,
    parts: list[Part],
) -> Made:
    """The bank of the pixels as they travel, less what the gate keeps back. Raises LearningError."""
    features, logits = [], []
    for pixels in torch.split(pixels_MCHW, options.batch_size):
        found = model.features(
            transforms.normalise(pixels, plan).contiguous(memory_format=torch.channels_last)
        )
        features.append(found)
        logits.append(model.head(found))
    features_MD, logits_MK = torch.cat(features), torch.cat(logits)
    if not bool(torch.isfinite(logits_MK).all() and torch.isfinite(features_MD).all()):
        raise LearningError(
            "synthesis: the global model's answer to its impressions holds NaN or Inf",
            hint="the global model itself may have diverged",
        )
    bank = Bank.of(pixels_MCHW, labels_M, born_M, logits_MK, features_MD)
    verdict = None
    if options.gate and options.planned_steps(warm=False) > 0:
        verdict = inspect(pixels_MCHW.cpu(), labels_M, logits_MK.cpu(), features_MD.cpu(), options)
        bank = bank[verdict.passed]
        if not len(bank):
            raise LearningError(
                f"no impression passed the gate: {verdict.describe()}",
                hint="the model may know too little yet; raise worth_remembering or steps",
            )
    steps = (parts[0].steps, parts[1].steps if len(parts) > 1 else 0)
    notes = [verdict.describe() if verdict else ""]
    if options.time_budget_s is not None:
        notes.append(f"{steps[0]} steps for new images, {steps[1]} for kept ones by the time budget")
    kept = len(parts[1].labels) if len(parts) > 1 else 0
    note = "; ".join(note for note in notes if note)
    return Made(bank, kept, len(parts[0].labels), steps, verdict, note)


def _start(
    plan: Plan,
    options: SynthesisOptions,
    labels_M: Tensor,
    bounds: tuple[Tensor, Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Starting images [M, C, H, W], normalised, for new impressions."""
    if options.start_images is None:
        # A generator's weights are the run's, so that a class looks alike in all rounds.
        style = Style(labels_M, plan.model.classes, _generator(plan, "start", 0))
        return starting_images(options.start, (len(labels_M), *plan.model.input), bounds, generator, style)
    images = torch.from_numpy(public_images(Path(options.start_images), plan.model.input))
    chosen = torch.randint(len(images), (len(labels_M),), generator=generator)
    return transforms.normalise(images[chosen], plan)


def _suits(bank: Bank | None, plan: Plan) -> bool:
    """Whether a bank is of this plan's images and classes."""
    return (
        bank is not None
        and tuple(bank.images.shape[1:]) == plan.model.input
        and (not len(bank) or int(bank.labels.max()) < plan.model.classes)
    )


def _frozen(plan: Plan, state: Mapping[str, Tensor], device: ComputeDevice) -> FederatedModel:
    with torch.random.fork_rng(devices=[]):
        model = build_model(plan.model)
    model.load_state_dict(dict(state))
    return device.place(model).eval().requires_grad_(False)


def _placed(part: Part, device: ComputeDevice) -> Part:
    images = part.images.to(device.device, memory_format=torch.channels_last)
    return Part(images, part.labels.to(device.device), part.steps)


def _generator(plan: Plan, purpose: str, round_number: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(plan.seed, purpose, round_number))


class _Reporter:
    """Passes progress on a few times a second, and ends the loop when the job is withdrawn."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._told = -PROGRESS_INTERVAL_S

    def __call__(self, done: int, total: int, loss: Tensor) -> None:
        self._job.check()
        now = time.monotonic()
        if now - self._told >= PROGRESS_INTERVAL_S or done == total:
            self._told = now
            value = float(loss)
            self._job.progress(
                stage="synthesising",
                done=done,
                total=total,
                loss=round(value, 4) if abs(value) < float("inf") else None,
            )
