"""A site's part of a round: start from the global model, train on the site's images, leave an update.

Every generator is seeded from (plan's seed, purpose, round, site), so a repeated round gives the same bytes
on the CPU with the same number of threads.

Legend: N images, C channels, H x W pixels, K classes.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedagent.bank_check import PicturesOf, checked
from fedagent.batches import EpochOrder, ImpressionSampler, impressions_in_batch
from fedagent.encoding import encode_update
from fedagent.impression_bank import ResidentBank
from fedagent.local_state import LocalState
from fedagent.objectives import load_objective
from fedagent.objectives.base import Batch, LocalContext, LocalObjective
from fedagent.resident import ResidentImages
from fedcore.compute_worker import Job
from fedcore.data import transforms
from fedcore.device import ComputeDevice
from fedcore.errors import DataError, LearningError, TensorMismatchError
from fedcore.impression_check import ImpressionCheck
from fedcore.models import build_model
from fedcore.models.base import FederatedModel
from fedcore.models.state_file import load_tensors, save_state, specs_of
from fedcore.plan import Plan, TrainingSection
from fedcore.seeding import derive_seed
from fedcore.tensor_file import TensorManifest, check_expected

PROGRESS_INTERVAL_S = 0.2
# Begin the names of what an objective keeps, and of what a coding left out, in the file of what stays at the site.
_KEPT = "kept/"
_LEFT_OUT = "left out/"


@dataclass(frozen=True, slots=True)
class TrainRequest:
    """What the coordinator asks of a site in a round; paths are this site's."""

    plan: Plan
    site: str
    run: str
    round: int
    # The global model.
    model: Path
    # The bank of impressions; None while there is none.
    impressions: Path | None
    objective: str
    objective_options: Mapping[str, Any]
    # Tensors that stay here, and the folder that keeps them.
    local_tensors: Sequence[str]
    state: Path
    out: Path
    # Tensors that are sent as well as kept: the site goes on with its own.
    personal_tensors: Sequence[str] = ()
    # What the strategy keeps at the coordinator and shares; None while there is none.
    strategy_state: Path | None = None

    @property
    def who(self) -> str:
        """How messages begin."""
        return f"{self.site} round {self.round}"

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator for one purpose of this round at this site."""
        seed = derive_seed(self.plan.seed, purpose, self.round, self.site)
        return torch.Generator().manual_seed(seed)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The update's digest, and what the site reports of it. `train_loss` is the mean over the last epoch."""

    digest: str
    num_examples: int
    num_steps: int
    train_loss: float
    num_impressions: int
    seconds: float
    # What the site's check of the impressions found; None if none came, or the check is off.
    impression_check: ImpressionCheck | None = None


def train(
    request: TrainRequest,
    images: ResidentImages,
    device: ComputeDevice,
    job: Job,
    *,
    pictures_of: PicturesOf | None = None,
) -> TrainResult:
    """Train for a round and write the update to `request.out`: the model's tensors less the local ones, and what
    the objective adds. Local and personal tensors start from what the site's round before left of them.

    With `pictures_of`, which gives what `images` are compared by, impressions that come too near an image are not
    trained on; if all do, the round goes on as one without impressions. A check that refuses none changes no bit.

    Ends within a batch when the job is cancelled; nothing is then kept. Raises DataError if there is no
    image, LearningError if the loss or a weight stops being finite, TensorMismatchError if the global model
    is not of the plan's architecture, PlanError if the objective or an option of it is unknown here.
    """
    began = time.monotonic()
    if not len(images):
        raise DataError(
            f"{request.who}: there are no training images",
            hint="check [data] in agent.toml and the class names",
        )
    objective = load_objective(request.objective, request.objective_options)
    bank = None
    if objective.mixes_impressions and request.impressions is not None:
        bank = ResidentBank.open(request.impressions, request.plan, device)
    torch.manual_seed(derive_seed(request.plan.seed, "dropout", request.round, request.site))
    local = LocalState(request.state)
    before = local.before(request.round)
    received = load_tensors(request.model)
    own_tensors = (*request.local_tensors, *request.personal_tensors)
    start = with_own(received, own_tensors, before)
    model = load_model(request.plan, start, device, request.who).train()
    figures = None
    if bank is not None and pictures_of is not None:
        bank, figures = checked(bank, images, model, request.plan, device, pictures_of=pictures_of, job=job)
    context = LocalContext(
        site=request.site,
        run=request.run,
        round=request.round,
        model=model,
        class_counts=images.class_counts(request.plan.model.classes),
        state=request.state,
        build_global_model=lambda: load_model(request.plan, start, device, request.who),
        strategy_state=_on_device(request.strategy_state, device),
        kept={name: tensor.to(device.device) for name, tensor in _with_prefix(before, _KEPT).items()},
        learning_rate=learning_rate(request.plan.training, request.round, request.plan.rounds),
        training=request.plan.training,
    )
    loop = _Loop(request, objective, context, images=images, bank=bank, device=device)
    loop.run(job)
    trained = _on_cpu(model.state_dict())
    ending = objective.end(context, loop.num_steps)
    extras, left = _on_cpu(ending.extras), _on_cpu(ending.kept)
    _check_finite({**trained, **extras, **left}, request.who)
    kept = {name: trained[name] for name in own_tensors}
    local_tensors = set(request.local_tensors)
    sent = {name: tensor for name, tensor in trained.items() if name not in local_tensors} | extras
    coded = encode_update(
        sent,
        received,
        request.plan.transfer,
        left_out=_with_prefix(before, _LEFT_OUT),
        generator=request.generator("update rounding"),
    )
    digest = save_state(request.out, coded.sent)
    kept |= {f"{_KEPT}{name}": tensor for name, tensor in left.items()}
    kept |= {f"{_LEFT_OUT}{name}": tensor for name, tensor in coded.left_out.items()}
    if kept:
        local.save(request.round, kept)
    return TrainResult(
        digest=digest,
        num_examples=len(images),
        num_steps=loop.num_steps,
        train_loss=loop.last_epoch_loss(),
        num_impressions=loop.num_impressions,
        seconds=time.monotonic() - began,
        impression_check=figures,
    )


def with_own(
    received: Mapping[str, Tensor], own_tensors: Sequence[str], own: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The global model's tensors, those of `own_tensors` replaced by the site's own where it has them.

    Raises TensorMismatchError if one of them is not the model's.
    """
    unknown = [name for name in own_tensors if name not in received]
    if unknown:
        raise TensorMismatchError(f"the site's own tensor '{unknown[0]}' is not in the model")
    return {**received, **{name: own[name] for name in own_tensors if own is not None and name in own}}


def load_model(plan: Plan, state: Mapping[str, Tensor], device: ComputeDevice, who: str) -> FederatedModel:
    """The plan's model with these tensors, on the device.

    Raises TensorMismatchError that names the first misfit.
    """
    with torch.random.fork_rng(devices=[]):
        model = build_model(plan.model)
    expected = TensorManifest.of(specs_of(model.state_dict()))
    check_expected(TensorManifest.of(specs_of(state)), expected, f"{who}: model '{plan.model.name}'")
    model.load_state_dict(state)
    return device.place(model)


def learning_rate(training: TrainingSection, round_number: int, rounds: int) -> float:
    """The rate of round `round_number` (from 1) of `rounds`: constant, or from full down half a cosine.

    Source of the cosine: Loshchilov & Hutter 2017, SGDR, arXiv:1608.03983.
    """
    if training.schedule == "constant":
        return training.learning_rate
    return training.learning_rate * (1 + math.cos(math.pi * (round_number - 1) / rounds)) / 2


def build_optimiser(model: torch.nn.Module, training: TrainingSection, rate: float) -> torch.optim.Optimizer:
    """A fresh optimiser for a round: its momenta start at zero in each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if training.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, lr=rate, momentum=training.momentum, weight_decay=training.weight_decay
        )
    kind = torch.optim.Adam if training.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=rate, weight_decay=training.weight_decay)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _on_device(path: Path | None, device: ComputeDevice) -> dict[str, Tensor]:
    """The strategy's state. Raises StorageError if the file is damaged."""
    tensors = load_tensors(path) if path is not None else {}
    return {name: tensor.to(device.device) for name, tensor in tensors.items()}


def _with_prefix(before: Mapping[str, Tensor] | None, prefix: str) -> dict[str, Tensor]:
    """What the round before left under names that begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in (before or {}).items()
        if name.startswith(prefix)
    }


def _check_finite(state: Mapping[str, Tensor], who: str) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise LearningError(
                f"{who}: tensor '{name}' holds NaN or Inf after training", hint="lower training.learning_rate"
            )


class _Loop:
    """The batches of one round."""

    def __init__(
        self,
        request: TrainRequest,
        objective: LocalObjective,
        context: LocalContext,
        *,
        images: ResidentImages,
        bank: ResidentBank | None,
        device: ComputeDevice,
    ) -> None:
        training = request.plan.training
        self._request = request
        self._objective = objective
        self._context = context
        self._images = images
        self._bank = bank
        self._device = device
        self._order = EpochOrder(len(images), training.batch_size, request.generator("batches"))
        self._sampler: ImpressionSampler | None = None
        if bank is not None and objective.impression_ratio > 0:
            weights = objective.impression_weights(bank.images.labels, context)
            self._sampler = ImpressionSampler(len(bank), request.generator("impressions"), weights)
        self._augmentation = request.generator("augmentation")
        self._optimiser = build_optimiser(context.model, training, context.learning_rate)
        half = device.low_precision(training.precision) is torch.float16
        self._scaler = torch.amp.GradScaler(device.kind, enabled=half)
        self.num_steps = training.epochs * len(self._order)
        # Kept on the device: reading each loss at once would make a GPU wait for the CPU in every batch.
        self._losses = torch.zeros(self.num_steps, device=device.device)

    def run(self, job: Job) -> None:
        """Train all epochs, with progress a few times a second. Raises Cancelled, LearningError."""
        self._objective.begin(self._context)
        began = told = time.monotonic()
        step = checked = seen = 0
        job.progress(stage="training", done=0, total=self.num_steps, loss=None, images_per_s=0.0)
        for _ in range(self._request.plan.training.epochs):
            for indices in self._order.epoch():
                job.check()
                self._losses[step] = self._step(indices)
                step += 1
                seen += len(indices)
                now = time.monotonic()
                if now - told >= PROGRESS_INTERVAL_S or step == self.num_steps:
                    loss = self._checked_loss(checked, step)
                    checked, told = step, now
                    speed = round(seen / max(now - began, 1e-9), 1)
                    job.progress(
                        stage="training", done=step, total=self.num_steps, loss=loss, images_per_s=speed
                    )

    @property
    def num_impressions(self) -> int:
        """Different impressions trained on."""
        return self._sampler.num_distinct if self._sampler else 0

    def last_epoch_loss(self) -> float:
        """Mean loss over the last epoch's batches."""
        return float(self._losses[-len(self._order) :].mean())

    def _step(self, indices: Tensor) -> Tensor:
        batch = self._batch(indices)
        with self._device.autocast(self._request.plan.training.precision):
            outputs = self._objective.outputs(batch, self._context)
            loss = self._objective.loss(batch, outputs, self._context)
        self._optimiser.zero_grad(set_to_none=True)
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.step(self._optimiser)
        self._scaler.update()
        return loss.detach()

    def _batch(self, indices: Tensor) -> Batch:
        pixels_NCHW, labels_N = self._images.take(indices)
        num_real = len(labels_N)
        extras: dict[str, Tensor] = {}
        if self._sampler is not None and self._bank is not None:
            wanted = impressions_in_batch(num_real, self._objective.impression_ratio)
            bank_pixels, bank_labels, extras = self._bank.take(self._sampler.draw(wanted))
            pixels_NCHW = torch.cat([pixels_NCHW, bank_pixels])
            labels_N = torch.cat([labels_N, bank_labels])
        plan = self._request.plan
        images_NCHW = transforms.normalise(pixels_NCHW, plan)
        if plan.transform.augment:
            images_NCHW = transforms.augment(images_NCHW, plan.transform.augment, self._augmentation)
        is_impression_N = torch.arange(len(labels_N), device=labels_N.device) >= num_real
        return Batch(
            images_NCHW.contiguous(memory_format=torch.channels_last),
            labels_N,
            is_impression_N,
            extras=extras,
            num_impressions=len(labels_N) - num_real,
        )

    def _checked_loss(self, checked: int, step: int) -> float:
        """The newest loss, rounded for display. Raises LearningError if one since `checked` is not finite."""
        recent = self._losses[checked:step].cpu()
        bad = (~torch.isfinite(recent)).nonzero()
        if len(bad):
            first = int(bad[0])
            raise LearningError(
                f"{self._request.who}: the loss is {float(recent[first])} in batch {checked + first + 1}"
                f" of {self.num_steps}",
                hint="lower training.learning_rate",
            )
        return round(float(recent[-1]), 4)
