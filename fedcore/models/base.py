"""What every model has: features, a linear head, and how its options and normalisation layers are read.

Shapes: N images, C channels, H x W pixels, D features, K classes.
"""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from fedcore.errors import ConfigError, PlanError
from fedcore.plan import ModelSection, Scalar


class FederatedModel(nn.Module):
    """A classifier that is a feature extractor and one linear head: logits_NK = head(features(images_NCHW)).

    Impressions need the two apart: the gradient of the cross-entropy with respect to the head's weight is a
    product of logits and features. Subclasses set `head` and override `features`.
    """

    head: nn.Linear

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Map normalised images [N, C, H, W] to features [N, D]."""
        raise NotImplementedError

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Map normalised images [N, C, H, W] to logits [N, K]."""
        logits_NK: Tensor = self.head(self.features(images_NCHW))
        return logits_NK


def check_model(model: object, section: ModelSection) -> FederatedModel:
    """Check that what a builder made is a FederatedModel for the plan's classes. Raises ConfigError."""
    who = f"model '{section.name}'"
    if not isinstance(model, FederatedModel):
        raise ConfigError(
            f"{who}: its builder made a {type(model).__name__}, expected a subclass of FederatedModel",
            hint="derive the class from fedcore.models.base.FederatedModel",
        )
    head = getattr(model, "head", None)
    if not isinstance(head, nn.Linear):
        raise ConfigError(f"{who}: head is a {type(head).__name__}, expected torch.nn.Linear")
    if head.out_features != section.classes:
        raise ConfigError(
            f"{who}: head has {head.out_features} outputs, expected classes = {section.classes}"
        )
    return model


def read_options(section: ModelSection, defaults: Mapping[str, Scalar]) -> dict[str, int]:
    """Options of a model, all of them integers of at least 1, with defaults filled in.

    Raises PlanError that names an unknown option, or one with a value that is not such a number.
    """
    for name, value in section.options.items():
        if name not in defaults:
            known = ", ".join(sorted(defaults)) or "none"
            raise PlanError(f"model.options: '{section.name}' has no option '{name}', known: {known}")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PlanError(f"model.options.{name}: expected a whole number of at least 1, got {value!r}")
    merged = {**defaults, **section.options}
    return {name: int(value) for name, value in merged.items() if isinstance(value, int)}


def require_size(section: ModelSection, minimum_px: int) -> None:
    """Check that the input has at least so many pixels a side. Raises PlanError."""
    _, height, width = section.input
    if min(height, width) < minimum_px:
        raise PlanError(
            f"model.input is {list(section.input)}, '{section.name}' needs at least {minimum_px} px a side",
            hint="a larger [transform] size enlarges the images; or choose 'cnn', which takes 8 x 8 and up",
        )


def make_norm(kind: str, channels: int) -> nn.Module:
    """A normalisation layer over images [N, C, H, W] or features [N, C]: BatchNorm2d or GroupNorm."""
    return nn.GroupNorm(group_count(channels), channels) if kind == "group" else nn.BatchNorm2d(channels)


def group_count(channels: int) -> int:
    """Groups for GroupNorm: the largest power of two up to 32 that leaves 8 channels or more in a group.

    Source: Wu & He 2018, Group Normalization, table 3 (insensitive between 8 and 32 channels a group).
    """
    for groups in (32, 16, 8, 4, 2):
        if channels % groups == 0 and channels // groups >= 8:
            return groups
    return 1


def norm_tensor_names(model: nn.Module) -> list[str]:
    """State-dict names, parameters and buffers, of all normalisation layers, in the state dict's order.

    These are what FedBN keeps at a site (Li et al. 2021, FedBN: Federated Learning on Non-IID Features via
    Local Batch Normalization).
    """
    norms = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    owned = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, norms)
        for name in module.state_dict()
    }
    return [name for name in model.state_dict() if name in owned]


def batch_norm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers that store a mean and a variance for inference, by module name, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
