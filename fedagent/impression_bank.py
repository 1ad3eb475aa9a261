"""A bank of impressions at a site: pixels and labels, and what travels with them, checked before use.

Legend: M impressions, B in a batch, K classes, D features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fedagent.resident import ResidentImages
from fedcore.device import ComputeDevice
from fedcore.errors import DataError
from fedcore.models.state_file import load_tensors
from fedcore.plan import Plan

EXTRAS = ("soft_targets", "features")


@dataclass(frozen=True, slots=True)
class ResidentBank:
    """`images` of the bank and `extras` by name, each float16 [M, ...] on the device."""

    images: ResidentImages
    extras: Mapping[str, Tensor]

    @classmethod
    def open(cls, path: Path, plan: Plan, device: ComputeDevice) -> Self:
        """Read a bank. Raises StorageError, DataError if it does not suit the plan's model."""
        images = ResidentImages.of_bank(path, plan, device)
        tensors = load_tensors(path)
        found = {name: tensors[name] for name in EXTRAS if name in tensors}
        for name, tensor in found.items():
            if tensor.dtype != torch.float16 or tensor.ndim != 2 or len(tensor) != len(images):
                raise DataError(
                    f"impressions: {name} are {tensor.dtype} {list(tensor.shape)},"
                    f" expected float16 [{len(images)}, ...]"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise DataError(f"impressions: {name} hold NaN or Inf")
        soft = found.get("soft_targets")
        if soft is not None and soft.shape[1] != plan.model.classes:
            raise DataError(
                f"impressions: soft_targets are of {soft.shape[1]} classes, the model has {plan.model.classes}"
            )
        return cls(images, {name: tensor.to(device.device) for name, tensor in found.items()})

    def __len__(self) -> int:
        """Number of impressions."""
        return len(self.images)

    def chosen(self, indices_B: Tensor) -> Self:
        """Only the impressions at these indices (on the CPU)."""
        where = indices_B.to(self.images.device)
        return type(self)(
            self.images.chosen(indices_B),
            {name: tensor.index_select(0, where) for name, tensor in self.extras.items()},
        )

    def take(self, indices_B: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Pixels, labels and extras at these indices (on the CPU), on the device."""
        pixels, labels = self.images.take(indices_B)
        where = indices_B.to(self.images.device, non_blocking=True)
        return pixels, labels, {name: tensor.index_select(0, where) for name, tensor in self.extras.items()}
