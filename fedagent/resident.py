"""Images that stay on the training device between commands, as pixels: a quarter of float32's memory.

Legend: N images, B in a batch, C channels, H x W pixels, K classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fedcore.data import LabelledImages
from fedcore.device import ComputeDevice
from fedcore.errors import DataError
from fedcore.models.state_file import load_tensors
from fedcore.plan import Plan


@dataclass(frozen=True, slots=True)
class ResidentImages:
    """`images` uint8 [N, C, H, W] and `labels` int64 [N]; on the device if they fit, else pinned."""

    images: Tensor
    labels: Tensor
    device: torch.device

    @classmethod
    def of(cls, images: LabelledImages, device: ComputeDevice) -> Self:
        """Move a split to the device."""
        return cls._placed(
            torch.from_numpy(images.images).permute(0, 3, 1, 2), torch.from_numpy(images.labels), device
        )

    @classmethod
    def of_bank(cls, path: Path, plan: Plan, device: ComputeDevice) -> Self:
        """Read a bank of impressions. Raises StorageError, DataError if it does not suit the plan's model."""
        tensors = load_tensors(path)
        images, labels = tensors.get("images"), tensors.get("labels")
        if images is None or labels is None:
            raise DataError(f"impressions: tensors are {sorted(tensors)[:5]}, expected images and labels")
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != plan.model.input or not len(images):
            raise DataError(
                f"impressions: images are {images.dtype} {list(images.shape)},"
                f" expected uint8 [M, {', '.join(map(str, plan.model.input))}] with M > 0"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"impressions: labels are {labels.dtype} {list(labels.shape)}, expected int64 [M]"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= plan.model.classes:
            raise DataError(
                f"impressions: labels reach from {int(labels.min())} to {int(labels.max())},"
                f" the model has {plan.model.classes} classes"
            )
        return cls._placed(images, labels, device)

    @classmethod
    def _placed(cls, images_NCHW: Tensor, labels_N: Tensor, device: ComputeDevice) -> Self:
        images_NCHW = images_NCHW.contiguous()
        if device.holds(images_NCHW.nbytes):
            images_NCHW = images_NCHW.to(device.device)
        elif device.is_cuda:
            images_NCHW = images_NCHW.pin_memory()
        return cls(images_NCHW, labels_N.to(device.device), device.device)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def chosen(self, indices_B: Tensor) -> Self:
        """Only the images at these indices (on the CPU), where they are."""
        images = self.images.index_select(0, indices_B.to(self.images.device))
        if self.images.is_pinned():
            images = images.pin_memory()
        return type(self)(images, self.labels.index_select(0, indices_B.to(self.device)), self.device)

    def take(self, indices_B: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, C, H, W] uint8 and labels [B] at these indices (on the CPU), on the device."""
        images = self.images
        pixels = images.index_select(0, indices_B.to(images.device, non_blocking=True))
        labels = self.labels.index_select(0, indices_B.to(self.device, non_blocking=True))
        return pixels.to(self.device, non_blocking=True), labels

    def class_counts(self, classes: int) -> Tensor:
        """Images of each class, [K] float32 on the device."""
        return torch.bincount(self.labels.cpu(), minlength=classes).to(self.device, torch.float32)
