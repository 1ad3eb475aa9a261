# ruff: noqa: N803, N806 - shape suffixes
"""The transform that sites and coordinator share: pixels <-> normalised tensors, and augmentation.

normalised = (pixel / 255 - mean) / std, a channel. Synthesis inverts it. torch is imported when it is first
needed. Shapes: N images, C channels, H x W pixels.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedcore.plan import Plan

if TYPE_CHECKING:
    from torch import Generator, Tensor, device

# Largest shift, as a share of the side.
MAX_SHIFT = 0.125


def normalise(images: "Tensor", plan: Plan) -> "Tensor":
    """Map pixels uint8 [N, H, W, C] or [N, C, H, W] to float32 [N, C, H, W] on the images' device.

    Which of the two it is follows from the plan's input. Float pixels in [0, 255] are taken as well.
    """
    channels, height, width = plan.model.input
    if tuple(images.shape[1:]) == (height, width, channels):
        images = images.permute(0, 3, 1, 2)
    assert tuple(images.shape[1:]) == (channels, height, width), f"images {tuple(images.shape)}"
    mean, std = _statistics(plan, images.device)
    return ((images.float() / 255.0 - mean) / std).contiguous()


def to_pixels(images_NCHW: "Tensor", plan: Plan) -> "Tensor":
    """Map normalised images [N, C, H, W] back to pixels uint8 [N, C, H, W], rounded and clamped."""
    import torch

    mean, std = _statistics(plan, images_NCHW.device)
    pixels = (images_NCHW.float() * std + mean) * 255.0
    return pixels.round().clamp(0, 255).to(torch.uint8)


def pixel_bounds(plan: Plan) -> tuple["Tensor", "Tensor"]:
    """What black and white become under `normalise`: two float32 tensors [1, C, 1, 1], on the CPU."""
    import torch

    mean, std = _statistics(plan, torch.device("cpu"))
    return -mean / std, (1.0 - mean) / std


def augment(images_NCHW: "Tensor", kinds: Sequence[str], generator: "Generator") -> "Tensor":
    """Augment a batch, each image by its own draw; the result depends on images, kinds and the generator
    alone.

    hflip, vflip: with probability 1/2. rot90: by 0, 90, 180 or 270 degrees, where H = W, else by 0 or 180.
    shift: by up to an eighth of the side, the edge repeated. Applied in the order of `kinds`. The draws are
    made on the generator's device: a CPU generator gives the same draws whatever device the images are on.
    """
    for kind in kinds:
        images_NCHW = _AUGMENTATIONS[kind](images_NCHW, generator)
    return images_NCHW


def _hflip(images_NCHW: "Tensor", generator: "Generator") -> "Tensor":
    return _mirror(images_NCHW, 3, generator)


def _vflip(images_NCHW: "Tensor", generator: "Generator") -> "Tensor":
    return _mirror(images_NCHW, 2, generator)


def _mirror(images_NCHW: "Tensor", axis: int, generator: "Generator") -> "Tensor":
    import torch

    chosen_N = _draw(2, images_NCHW, generator) == 1
    return torch.where(chosen_N[:, None, None, None], images_NCHW.flip(axis), images_NCHW)


def _rot90(images_NCHW: "Tensor", generator: "Generator") -> "Tensor":
    import torch

    square = images_NCHW.shape[2] == images_NCHW.shape[3]
    turns_N = _draw(4, images_NCHW, generator) if square else 2 * _draw(2, images_NCHW, generator)
    result = images_NCHW
    for turns in (1, 2, 3) if square else (2,):
        chosen_N = turns_N == turns
        result = torch.where(chosen_N[:, None, None, None], images_NCHW.rot90(turns, (2, 3)), result)
    return result


def _shift(images_NCHW: "Tensor", generator: "Generator") -> "Tensor":
    import torch

    for axis in (2, 3):
        side = images_NCHW.shape[axis]
        most = max(1, int(side * MAX_SHIFT))
        offsets_N = _draw(2 * most + 1, images_NCHW, generator) - most
        places = torch.arange(side, device=images_NCHW.device)
        source_NS = (places[None, :] + offsets_N[:, None]).clamp(0, side - 1)
        index = source_NS[:, None, :, None] if axis == 2 else source_NS[:, None, None, :]
        images_NCHW = images_NCHW.gather(axis, index.expand_as(images_NCHW))
    return images_NCHW


_AUGMENTATIONS = {"hflip": _hflip, "vflip": _vflip, "rot90": _rot90, "shift": _shift}


def _draw(below: int, images_NCHW: "Tensor", generator: "Generator") -> "Tensor":
    import torch

    drawn = torch.randint(below, (len(images_NCHW),), generator=generator, device=generator.device)
    return drawn.to(images_NCHW.device)


def _statistics(plan: Plan, where: "device") -> tuple["Tensor", "Tensor"]:
    import torch

    mean = torch.tensor(plan.mean, dtype=torch.float32, device=where).view(1, -1, 1, 1)
    std = torch.tensor(plan.std, dtype=torch.float32, device=where).view(1, -1, 1, 1)
    return mean, std
