"""A model of any size that computes next to nothing: it measures what a round costs beside training."""

import math

import torch
from torch import Tensor, nn

from fedcore.errors import PlanError
from fedcore.models.base import FederatedModel, read_options
from fedcore.plan import ModelSection

# The shapes of ResNet-18's convolutions, largest first; none above 2.4 million numbers.
_SHAPES = (
    (512, 512, 3, 3), (512, 512, 3, 3), (512, 512, 3, 3), (512, 256, 3, 3), (256, 256, 3, 3),
    (256, 256, 3, 3), (256, 256, 3, 3), (256, 128, 3, 3), (128, 128, 3, 3), (128, 128, 3, 3),
    (128, 128, 3, 3), (512, 256, 1, 1),
    (128, 64, 3, 3), (64, 64, 3, 3), (64, 64, 3, 3), (64, 64, 3, 3), (64, 64, 3, 3), (256, 128, 1, 1),
    (64, 3, 7, 7), (128, 64, 1, 1),
)  # fmt: skip


class NoOp(FederatedModel):
    """`num_params` float32 parameters in all; the head sees the channels' means, the rest lies idle."""

    def __init__(self, channels: int, classes: int, num_params: int) -> None:
        super().__init__()
        self.head = nn.Linear(channels, classes)
        idle = num_params - (channels + 1) * classes
        self.idle = nn.ParameterList(nn.Parameter(torch.rand(shape).sub_(0.5)) for shape in _shapes_of(idle))

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Map normalised images [N, C, H, W] to features [N, C]."""
        return images_NCHW.mean(dim=(2, 3))


def _shapes_of(count: int) -> list[tuple[int, ...]]:
    """Shapes of `count` numbers in all: rounds of the list above as far as they fit, then one vector."""
    shapes: list[tuple[int, ...]] = []
    while count > 0:
        fitting = [shape for shape in _SHAPES if math.prod(shape) <= count]
        if not fitting:
            return [*shapes, (count,)]
        for shape in fitting:
            if math.prod(shape) <= count:
                shapes.append(shape)
                count -= math.prod(shape)
    return shapes


def build(section: ModelSection) -> NoOp:
    """Build `noop`; option `params` (1,000,000), the number of parameters. Raises PlanError."""
    params = read_options(section, {"params": 1_000_000})["params"]
    channels = section.input[0]
    least = (channels + 1) * section.classes
    if params < least:
        raise PlanError(f"model.options.params is {params}, expected at least {least} (the head alone)")
    return NoOp(channels, section.classes, params)
