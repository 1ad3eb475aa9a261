"""ResNet-18 (He et al. 2016, Deep Residual Learning for Image Recognition), with BatchNorm or GroupNorm.

Images of up to 64 pixels a side get the stem that the paper uses for CIFAR: one 3x3 convolution, no pooling.
Tensors below the head are named as torchvision names them.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from fedcore.models.base import FederatedModel, make_norm, read_options, require_size
from fedcore.plan import ModelSection

SMALL_STEM_MAX_PX = 64


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first convolution has the stride."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = make_norm(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = make_norm(norm, channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), make_norm(norm, channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C_in, H, W] to [N, C, H/stride, W/stride]."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + self.downsample(x))


class ResNet18(FederatedModel):
    """Eight basic blocks in four stages of `width` x 1, 2, 4, 8 channels; features: 8 `width`."""

    def __init__(self, channels: int, classes: int, norm: str, *, small_stem: bool, width: int = 64) -> None:
        super().__init__()
        if small_stem:
            self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = make_norm(norm, width)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = self._stage(width, width, 1, norm)
        self.layer2 = self._stage(width, 2 * width, 2, norm)
        self.layer3 = self._stage(2 * width, 4 * width, 2, norm)
        self.layer4 = self._stage(4 * width, 8 * width, 2, norm)
        self.head = nn.Linear(8 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(channels_in: int, channels: int, stride: int, norm: str) -> nn.Sequential:
        return nn.Sequential(
            BasicBlock(channels_in, channels, stride, norm), BasicBlock(channels, channels, 1, norm)
        )

    def features(self, images_NCHW: Tensor) -> Tensor:
        """Map normalised images [N, C, H, W] to features [N, D]."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(images_NCHW))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        features_ND: Tensor = x.mean(dim=(2, 3))
        return features_ND


def build(section: ModelSection) -> ResNet18:
    """Build `resnet18`; option `width` (64). Raises PlanError."""
    options = read_options(section, {"width": 64})
    require_size(section, 8)
    channels, height, width = section.input
    small = min(height, width) <= SMALL_STEM_MAX_PX
    return ResNet18(channels, section.classes, section.norm, small_stem=small, width=options["width"])
