"""Model architectures by name. Importing this package does not import torch; building a model does.

Built in: `cnn`, `resnet18`, `alexnet_bn`, `noop`. The user's own: entry points of the group
`fedimpres.models`, a callable `(section: ModelSection) -> FederatedModel`.
"""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedcore.errors import ConfigError
from fedcore.plan import ModelSection
from fedcore.plugins import load_plugin, plugin_names

if TYPE_CHECKING:
    from fedcore.models.base import FederatedModel

__all__ = ["BUILT_IN", "build_model", "learns_from_images", "model_names"]

# Each module has `build(section) -> FederatedModel`.
BUILT_IN = {
    "alexnet_bn": "fedcore.models.alexnet_bn",
    "cnn": "fedcore.models.cnn",
    "noop": "fedcore.models.noop",
    "resnet18": "fedcore.models.resnet18",
}


def model_names() -> list[str]:
    """Names that `build_model` knows here, plug-ins included. Imports neither torch nor a plug-in."""
    return sorted([*BUILT_IN, *plugin_names("fedimpres.models", BUILT_IN)])


def learns_from_images(name: str) -> bool:
    """Whether the model is trained and scored on images. `noop` is not: its updates come from no image."""
    return name != "noop"


def build_model(section: ModelSection) -> "FederatedModel":
    """Build a model on the CPU in training mode, its weights drawn from torch's global generator.

    Raises ConfigError if the name is unknown or a plug-in is at fault, PlanError if the options or the input
    don't suit the architecture.
    """
    from fedcore.models.base import check_model

    build: Callable[[ModelSection], object]
    if section.name in BUILT_IN:
        build = importlib.import_module(BUILT_IN[section.name]).build
    else:
        plugin = load_plugin("fedimpres.models", section.name, BUILT_IN)
        if not callable(plugin):
            raise ConfigError(
                f"model plug-in '{section.name}' is a {type(plugin).__name__}, expected a callable"
            )
        build = plugin
    return check_model(build(section), section)
