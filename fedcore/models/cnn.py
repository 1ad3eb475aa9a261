"""A small net of three convolutions, for images from 8x8 to about 64x64 pixels."""

from torch import Tensor, nn
from torch.nn import functional as F

from fedcore.models.base import FederatedModel, make_norm, read_options, require_size
from fedcore.plan import ModelSection


class SmallCNN(FederatedModel):
    """Three 3x3 convolutions, each normalised, with pooling in between and a grid of averages behind.

    `width` channels in the first convolution, doubled twice; features: 4 width x `grid` x `grid` averages.
    """

    def __init__(self, channels: int, classes: int, norm: str, *, width: int = 32, grid: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm1 = make_norm(norm, width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.norm2 = make_norm(norm, 2 * width)
        self.conv3 = nn.Conv2d(2 * width, 4 * width, 3, padding=1, bias=False)
        self.norm3 = make_norm(norm, 4 * width)
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.head = nn.Linear(4 * width * grid * grid, classes)

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Map normalised images [N, C, H, W] to features [N, D]."""
        # The maximum before the ReLU: the same numbers, and a quarter of the ReLU's work.
        x = F.relu(F.max_pool2d(self.norm1(self.conv1(images_NCHW)), 2))
        x = F.relu(F.max_pool2d(self.norm2(self.conv2(x)), 2))
        x = F.relu(self.norm3(self.conv3(x)))
        features_ND: Tensor = self.pool(x).flatten(1)
        return features_ND


def build(section: ModelSection) -> SmallCNN:
    """Build `cnn`; options `width` (32) and `grid` (2). Raises PlanError."""
    options = read_options(section, {"width": 32, "grid": 2})
    require_size(section, 8)
    return SmallCNN(
        section.input[0], section.classes, section.norm, width=options["width"], grid=options["grid"]
    )
