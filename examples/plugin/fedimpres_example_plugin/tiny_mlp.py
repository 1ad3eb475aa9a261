"""The model `tiny_mlp`: one hidden layer over all pixels."""

from torch import Tensor, nn
from torch.nn import functional as F

from fedcore.models.base import FederatedModel, read_options
from fedcore.plan import ModelSection


class TinyMLP(FederatedModel):
    """Features are `hidden` rectified units."""

    def __init__(self, pixels: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Linear(pixels, hidden)
        self.head = nn.Linear(hidden, classes)

    def features(self, images: Tensor) -> Tensor:
        """Map normalised images [N, C, H, W] to features [N, D]."""
        features: Tensor = F.relu(self.fc(images.flatten(1)))
        return features


def build(section: ModelSection) -> TinyMLP:
    """Build `tiny_mlp`; option `hidden` (64)."""
    channels, height, width = section.input
    hidden = read_options(section, {"hidden": 64})["hidden"]
    return TinyMLP(channels * height * width, section.classes, hidden)
