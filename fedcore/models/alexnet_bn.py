"""AlexNet with normalisation after every layer, the FedImpres paper's net for 256x256 retina images.

Sources: Krizhevsky 2014, One weird trick for parallelizing convolutional neural networks (the layer sizes);
Ioffe & Szegedy 2015 (BatchNorm in place of dropout and local response normalisation).
"""

from collections import OrderedDict

from torch import Tensor, nn

from fedcore.models.base import FederatedModel, group_count, make_norm, read_options, require_size
from fedcore.plan import ModelSection


class AlexNetBN(FederatedModel):
    """Five convolutions and two hidden linear layers, all normalised; features: `hidden`."""

    def __init__(self, channels: int, classes: int, norm: str, *, hidden: int = 4096) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            OrderedDict(
                [
                    *_convolution("1", nn.Conv2d(channels, 64, 11, stride=4, padding=2, bias=False), norm),
                    ("pool1", nn.MaxPool2d(3, stride=2)),
                    *_convolution("2", nn.Conv2d(64, 192, 5, padding=2, bias=False), norm),
                    ("pool2", nn.MaxPool2d(3, stride=2)),
                    *_convolution("3", nn.Conv2d(192, 384, 3, padding=1, bias=False), norm),
                    *_convolution("4", nn.Conv2d(384, 256, 3, padding=1, bias=False), norm),
                    *_convolution("5", nn.Conv2d(256, 256, 3, padding=1, bias=False), norm),
                    ("pool5", nn.MaxPool2d(3, stride=2)),
                    ("grid", nn.AdaptiveAvgPool2d(6)),
                    ("flatten", nn.Flatten()),
                    *_hidden("6", 256 * 6 * 6, hidden, norm),
                    *_hidden("7", hidden, hidden, norm),
                ]
            )
        )
        self.head = nn.Linear(hidden, classes)

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Map normalised images [N, C, H, W] to features [N, D]."""
        features_ND: Tensor = self.trunk(images_NCHW)
        return features_ND


def _convolution(label: str, layer: nn.Conv2d, norm: str) -> list[tuple[str, nn.Module]]:
    return [
        (f"conv{label}", layer),
        (f"norm{label}", make_norm(norm, layer.out_channels)),
        (f"relu{label}", nn.ReLU(inplace=True)),
    ]


def _hidden(label: str, units_in: int, units: int, norm: str) -> list[tuple[str, nn.Module]]:
    layer = nn.GroupNorm(group_count(units), units) if norm == "group" else nn.BatchNorm1d(units)
    return [
        (f"fc{label}", nn.Linear(units_in, units, bias=False)),
        (f"norm{label}", layer),
        (f"relu{label}", nn.ReLU(inplace=True)),
    ]


def build(section: ModelSection) -> AlexNetBN:
    """Build `alexnet_bn`; option `hidden` (4096). Raises PlanError."""
    options = read_options(section, {"hidden": 4096})
    require_size(section, 64)
    return AlexNetBN(section.input[0], section.classes, section.norm, hidden=options["hidden"])
