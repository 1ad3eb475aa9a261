"""The loop that makes impressions: the global model is frozen, images move.

Source: Arya et al. 2024, "FedImpres: Federated Impressions", arXiv:2409.07351. Different from it by default:
Adam, whose step does not depend on the loss's scale or the batch size; more terms (`loss.py`); images are
projected to the range of pixels after every step. `space = "spectrum"` moves coefficients instead (`spectrum.py`).

Legend: M images in all, B in a batch, C channels, H x W pixels, K classes, D features.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fedcore.errors import LearningError
from fedserver.synthesis import loss as sums
from fedserver.synthesis import objective
from fedserver.synthesis.frozen_norm import frozen_norms
from fedserver.synthesis.objective import LayerStatistics
from fedserver.synthesis.options import SynthesisOptions
from fedserver.synthesis.spectrum import CosineSpace

# Steps that warm a device up and steps that are timed, where a time budget becomes a step count.
UNTIMED_STEPS = 2
TIMED_STEPS = 3


class InvertibleModel(Protocol):
    """What synthesis needs of a model."""

    head: nn.Linear

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Features [N, D] of images."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Every layer."""
        ...


# Told after each step: steps done, steps in all, loss. May raise to end the loop.
Watcher = Callable[[int, int, Tensor], None]


@dataclass(frozen=True, slots=True)
class Part:
    """Images [M, C, H, W] in normalised units with labels [M], to be optimised for `steps` a pass."""

    images: Tensor
    labels: Tensor
    steps: int


@dataclass(slots=True)
class _Stretch:
    """One batch, with an optimiser of its own, which keeps its momenta from pass to pass.

    `moved` is what the optimiser moves: the coefficients of `space`, or without one the images themselves.
    """

    moved: Tensor
    space: CosineSpace | None
    labels: Tensor
    optimiser: torch.optim.Optimizer
    steps: int
    part: int
    done: int = 0

    def images(self, bounds: tuple[Tensor, Tensor]) -> Tensor:
        """Images [B, C, H, W] within the range of pixels; beyond it the gradient goes on as if there were none."""
        if self.space is None:
            return self.moved
        images_BCHW = self.space.images(self.moved)
        return images_BCHW + (images_BCHW.clamp(*bounds) - images_BCHW).detach()


class ImageOptimiser:
    """Optimises parts of a bank against one frozen model.

    `model` is frozen and in eval mode, on the images' device, as is `last_model`, the last round's global
    model; `bounds` are the lowest and highest value of a pixel. `generator`, on the CPU, draws shifts and
    flips. The models' features are computed within `autocast()`, heads and terms in float32.
    """

    def __init__(
        self,
        model: InvertibleModel,
        options: SynthesisOptions,
        *,
        bounds: tuple[Tensor, Tensor],
        generator: torch.Generator,
        last_model: InvertibleModel | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._model = model
        self._autocast = autocast
        self._options = options
        self._bounds = bounds
        self._generator = generator
        self._last_model = last_model if options.disagreement else None
        self._dual_KD = torch.zeros_like(model.head.weight.detach())
        self._wants_statistics = options.batch_norm is None or options.batch_norm > 0

    def optimise(self, parts: Sequence[Part], watch: Watcher) -> list[Tensor]:
        """Each part's images once the model sees their labels in them: tensors like those given.

        Raises LearningError if the loss is not finite; whatever `watch` raises.
        """
        stretches = list(self._stretches(parts))
        passes = self._options.dual_passes
        total = passes * sum(stretch.steps for stretch in stretches)
        done = 0
        with frozen_norms(self._model, record=self._wants_statistics) as layers:
            for pass_number in range(1, passes + 1):
                for stretch in stretches:
                    for _ in range(stretch.steps):
                        loss = self._step(stretch, layers)
                        done += 1
                        watch(done, total, loss)
                    if stretch.steps and not bool(torch.isfinite(loss)):
                        raise LearningError(
                            f"synthesis: the loss is {float(loss)} in pass {pass_number}",
                            hint="lower strategy_options.image_lr; the global model itself may have diverged",
                        )
                if pass_number < passes:
                    self._raise_dual(stretches)
        return [
            torch.cat([s.images(self._bounds).detach() for s in stretches if s.part == number])
            if len(part.labels)
            else part.images
            for number, part in enumerate(parts)
        ]

    def affordable(self, parts: Sequence[Part], budget_s: float) -> list[int]:
        """Steps for each part so that all passes fit `budget_s`, at most those asked, at least one.

        Steps of the largest batch of each part are timed on a copy. Raises LearningError, as `optimise`.
        """
        planned_s = 0.0
        for part in parts:
            if len(part.labels) and part.steps:
                batches = -(-len(part.labels) // self._options.batch_size)
                planned_s += self._options.dual_passes * part.steps * batches * self._step_seconds(part)
        share = min(1.0, budget_s / planned_s) if planned_s else 1.0
        return [max(1, int(part.steps * share)) if part.steps else 0 for part in parts]

    def _step_seconds(self, part: Part) -> float:
        size = self._options.batch_size
        state = self._generator.get_state()
        (stretch, *_) = self._stretches(
            [Part(part.images[:size], part.labels[:size], UNTIMED_STEPS + TIMED_STEPS)]
        )
        began = time.perf_counter()
        with frozen_norms(self._model, record=self._wants_statistics) as layers:
            for number in range(stretch.steps):
                if number == UNTIMED_STEPS:
                    began = time.perf_counter()
                float(self._step(stretch, layers))  # waits for a GPU
        self._generator.set_state(state)
        return (time.perf_counter() - began) / TIMED_STEPS

    def _stretches(self, parts: Sequence[Part]) -> Iterator[_Stretch]:
        size = self._options.batch_size
        for number, part in enumerate(parts):
            if not len(part.labels):
                continue
            for images, labels in zip(
                torch.split(part.images, size), torch.split(part.labels, size), strict=True
            ):
                # Channels apart: the terms on pixels are faster so. The model sees them channels last.
                moved_BCHW = images.detach().clone(memory_format=torch.contiguous_format)
                space = None
                if self._options.space == "spectrum" and part.steps:
                    space = CosineSpace(images.shape[2], images.shape[3], images)
                    moved_BCHW = space.coefficients(moved_BCHW)
                moved_BCHW.requires_grad_()
                optimiser = self._new_optimiser(moved_BCHW)
                yield _Stretch(moved_BCHW, space, labels, optimiser, part.steps, number)

    def _new_optimiser(self, moved_BCHW: Tensor) -> torch.optim.Optimizer:
        if self._options.optimizer == "sgd":
            return torch.optim.SGD([moved_BCHW], lr=self._options.image_lr, momentum=0.9)
        return torch.optim.Adam([moved_BCHW], lr=self._options.image_lr)

    def _step(self, stretch: _Stretch, layers: list[LayerStatistics]) -> Tensor:
        """One projected step; returns the loss before it, a scalar."""
        images_BCHW = stretch.images(self._bounds)
        layers.clear()
        seen_BCHW = self._jittered(images_BCHW).contiguous(memory_format=torch.channels_last)
        features_BD = self._features(self._model, seen_BCHW)
        view = sums.View(
            images=images_BCHW,
            labels=stretch.labels,
            features=features_BD,
            logits=self._model.head(features_BD),
            last_logits=self._last_logits(seen_BCHW),
            layers=layers,
        )
        loss = sums.total(sums.terms(view, self._model.head, self._dual_KD, self._options), images_BCHW)
        # For Adam the sum over images: an image's gradient is then the same in any batch, far above epsilon.
        scale = len(images_BCHW) if self._options.optimizer == "adam" else 1
        (stretch.moved.grad,) = torch.autograd.grad(loss * scale, [stretch.moved])
        self._set_rate(stretch)
        stretch.optimiser.step()
        stretch.done += 1
        if stretch.space is None:
            with torch.no_grad():
                stretch.moved.clamp_(*self._bounds)
        return loss.detach()

    def _set_rate(self, stretch: _Stretch) -> None:
        """Half a cosine over all passes. Source: Loshchilov & Hutter 2017, SGDR, arXiv:1608.03983."""
        if self._options.image_schedule == "cosine":
            progress = stretch.done / (stretch.steps * self._options.dual_passes)
            rate = self._options.image_lr * (1 + math.cos(math.pi * progress)) / 2
            stretch.optimiser.param_groups[0]["lr"] = rate

    def _jittered(self, images_BCHW: Tensor) -> Tensor:
        """The batch as this step sees it: shifted around its edges and perhaps mirrored, all images alike."""
        most = self._options.shift_px(images_BCHW.shape[2], images_BCHW.shape[3])
        if most:
            down, across = torch.randint(-most, most + 1, (2,), generator=self._generator).tolist()
            images_BCHW = images_BCHW.roll((down, across), (2, 3))
        if self._options.flip and int(torch.randint(2, (), generator=self._generator)):
            images_BCHW = images_BCHW.flip(3)
        return images_BCHW

    def _last_logits(self, images_BCHW: Tensor) -> Tensor | None:
        if self._last_model is None:
            return None
        logits_BK: Tensor = self._last_model.head(self._features(self._last_model, images_BCHW))
        return logits_BK

    def _features(self, model: InvertibleModel, images_BCHW: Tensor) -> Tensor:
        with self._autocast():
            features_BD = model.features(images_BCHW)
        return features_BD.float()

    @torch.no_grad()
    def _raise_dual(self, stretches: Sequence[_Stretch]) -> None:
        """The dual's ascent with the stationarity residual over all images."""
        gradient_KD = torch.zeros_like(self._dual_KD)
        count = 0
        for stretch in stretches:
            features_BD = self._features(self._model, stretch.images(self._bounds))
            logits_BK = self._model.head(features_BD)
            size = len(stretch.labels)
            gradient_KD += objective.head_gradient(logits_BK, features_BD, stretch.labels) * size
            count += size
        residual_KD = sums.residual(gradient_KD / max(count, 1), self._model.head.weight, self._options)
        self._dual_KD = objective.updated_dual(self._dual_KD, residual_KD, self._options.rho)
