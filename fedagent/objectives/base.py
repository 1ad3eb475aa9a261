"""What a site minimises: the local half of a strategy, a named objective with typed options.

An objective sees everything that a term may need: the batch with its mask of impressions, features and logits
of one joint forward pass, the site's own class counts, and the global model of the round, frozen. It returns
one loss; a correction of the gradient (control variates, say) is a term that is linear in the weights.

Legend: N images in a batch, K classes, D features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fedcore.models.base import FederatedModel
from fedcore.plan import TrainingSection


class ObjectiveOptions(BaseModel):
    """Base of an objective's options: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Batch:
    """Real images and impressions together, normalised, on the training device."""

    images: Tensor
    labels: Tensor
    # True where the image is an impression; real images come first.
    is_impression: Tensor
    # What an impression carries beside its label, aligned with the impressions of this batch (soft targets,
    # say).
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    # How many of the last images are impressions: known without asking the device.
    num_impressions: int = 0


@dataclass(frozen=True, slots=True)
class Outputs:
    """The model's answer to a batch."""

    features: Tensor
    logits: Tensor


@dataclass(frozen=True)
class LocalContext:
    """What holds for a whole round at a site."""

    site: str
    run: str
    round: int
    # In training; its parameters move from batch to batch.
    model: nn.Module
    # Training images of each class at this site, [K] float32 on the device. Never leaves the site.
    class_counts: Tensor
    # What this strategy keeps at the site between rounds.
    state: Path
    build_global_model: Callable[[], nn.Module]
    # What the strategy keeps at the coordinator and shares, by name, on the device; empty while there is none.
    strategy_state: Mapping[str, Tensor] = field(default_factory=dict)
    # What this objective's `end` kept at this site in the round before that it took part in; empty in the first.
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    # The round's learning rate, and the plan's section `training`.
    learning_rate: float = 0.0
    training: TrainingSection = field(default_factory=TrainingSection)

    @cached_property
    def global_model(self) -> nn.Module:
        """The model that this round started from, frozen, in eval mode. Built on first use."""
        return self.build_global_model().eval().requires_grad_(False)

    @cached_property
    def parameter_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Each trained parameter beside its value in the global model."""
        start = dict(self.global_model.named_parameters())
        return [(p, start[name]) for name, p in self.model.named_parameters() if p.requires_grad]


@dataclass(frozen=True, slots=True)
class Ending:
    """What an objective leaves beside the trained model."""

    # Travel with the update; exactly those that the strategy's `update_extras` names, "aux/...".
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    # Stay at the site, for the next round's `LocalContext.kept`.
    kept: Mapping[str, Tensor] = field(default_factory=dict)


class LocalObjective(ABC):
    """What a site minimises. Subclasses set `name` and `Options`."""

    name: ClassVar[str]
    Options: ClassVar[type[ObjectiveOptions]] = ObjectiveOptions
    # Whether batches hold impressions, `impression_ratio` to a real image, once there are impressions.
    mixes_impressions: ClassVar[bool] = False

    def __init__(self, options: ObjectiveOptions) -> None:
        self.options = options

    @property
    def impression_ratio(self) -> float:
        """Impressions to a real image in a batch, where `mixes_impressions`."""
        return 1.0

    def impression_weights(self, labels_M: Tensor, context: LocalContext) -> Tensor | None:
        """How often each impression of the bank, with these labels, is drawn [M]; None means alike."""
        return None

    def outputs(self, batch: Batch, context: LocalContext) -> Outputs:
        """The model's answer to a batch: one joint forward pass, unless overridden."""
        assert isinstance(context.model, FederatedModel)
        features = context.model.features(batch.images)
        return Outputs(features, context.model.head(features))

    def begin(self, context: LocalContext) -> None:
        """Prepare for a round, before the first batch."""
        return

    def end(self, context: LocalContext, num_steps: int) -> Ending:
        """Say what is left of a round after its last batch; `num_steps` batches were trained on.

        Must follow from the context alone, so that a repeated round leaves the same.
        """
        return Ending()

    @abstractmethod
    def loss(self, batch: Batch, outputs: Outputs, context: LocalContext) -> Tensor:
        """The loss of a batch: a scalar that can be differentiated."""
