"""How alike two pictures are, whatever their brightness, contrast, orientation and place: pixels only.

An image is compared by its *coarse* picture with every other, and by its *fine* picture with the few that come nearest:
area averages of at most 8 and 56 pixels a side. The distance of two fine pictures is the root mean square difference of
their values after each was brought to mean 0 and deviation 1: 0 is the same picture, 1.41 is nothing in common, 2 is the
negative. It is the smallest over mirror images, quarter turns (of square images) and shifts of up to one pixel in 28 of the
side, so that a copy that was turned, mirrored, shifted, blurred, encoded again, brightened or faded stays a near one.

Legend: M queries, N images searched, B in a chunk, C channels, H x W pixels, S orientations, P values of a picture,
Q candidates of a query.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor
from torch.nn import functional as F

from fedagent.resident import ResidentImages

COARSE_PX = 8
FINE_PX = 56
# How many images, by their coarse pictures, are compared with a query by their fine ones.
CANDIDATES = 8
# A copy may be shifted by one pixel for so many of the side.
SHIFT = 28
# In shares of the pixel range. Below this deviation an image is flat: what it shows is rounding, and is not blown up.
FLAT = 2 / 255
# Values in memory at a time: 64 MiB of float32.
_CHUNK_VALUES = 1 << 24
_QUERIES = 256

# Called with (done, total) now and then; may raise to end the work.
Tick = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Nearest:
    """Of each query: the distance to the nearest image, float32 [M], and that image's index, int64 [M]; on the CPU.

    The distance is infinite where there was nothing to compare with.
    """

    distances: Tensor
    indices: Tensor


class PictureIndex:
    """The coarse pictures of a set of images, to be searched: at most 0.4 kB an RGB image, on the images' device."""

    def __init__(self, images: ResidentImages, tick: Tick) -> None:
        """Average every image once, a chunk at a time."""
        self._images = images
        self._values = images.images.shape[1:].numel()
        parts = []
        step = max(1, _CHUNK_VALUES // self._values)
        for start in range(0, len(images), step):
            tick(start, len(images))
            pixels_BCHW = images.take(torch.arange(start, min(start + step, len(images))))[0]
            parts.append(standardised(averaged(pixels_BCHW, COARSE_PX).flatten(1)).half())
        self._coarse_NP = torch.cat(parts) if parts else torch.empty(0, 0)

    def nearest(self, queries_MCHW: Tensor, tick: Tick, *, itself: Tensor | None = None) -> Nearest:
        """The nearest image of each query, uint8 [M, C, H, W]. `itself` [M] are indices, one a query, to leave out."""
        found = []
        step = max(1, min(_QUERIES, _CHUNK_VALUES // self._values))
        for start in range(0, len(queries_MCHW), step):
            tick(start, len(queries_MCHW))
            queries = queries_MCHW[start : start + step].to(self._images.device)
            left_out = None if itself is None else itself[start : start + step].to(queries.device)
            found.append(self._compared(queries, *self._candidates(queries, left_out)))
        if not found:
            return Nearest(torch.empty(0), torch.empty(0, dtype=torch.int64))
        return Nearest(torch.cat([f.distances for f in found]), torch.cat([f.indices for f in found]))

    def _candidates(self, queries_MCHW: Tensor, left_out: Tensor | None) -> tuple[Tensor, Tensor]:
        """Indices and orientations, [M, Q] each, of the nearest coarse pictures; the index is -1 where there is none."""
        turned_SMP = torch.stack(
            [standardised(p.flatten(1)) for p in orientations(averaged(queries_MCHW, COARSE_PX))]
        )
        ways, count, values = turned_SMP.shape
        alike_MQ = torch.empty(count, 0, device=turned_SMP.device)
        places_MQ = torch.empty(count, 0, dtype=torch.int64, device=turned_SMP.device)
        step = max(1, _CHUNK_VALUES // max(values, ways * count))
        for start in range(0, len(self._coarse_NP), step):
            chunk_BP = self._coarse_NP[start : start + step].float()
            # Minus half the squared distance, less what is the same for all images.
            alike_MSB = (turned_SMP @ chunk_BP.T - chunk_BP.square().sum(1) / 2).movedim(0, 1)
            if left_out is not None:
                own_M = left_out - start
                here_M = (own_M >= 0) & (own_M < len(chunk_BP))
                rows = here_M.nonzero()[:, 0]
                alike_MSB[rows, :, own_M[rows]] = -torch.inf
            alike_MB, way_MB = alike_MSB.max(dim=1)
            best = alike_MB.topk(min(CANDIDATES, len(chunk_BP)), dim=1)
            places = (best.indices + start) * ways + way_MB.gather(1, best.indices)
            alike_MQ = torch.cat([alike_MQ, best.values], dim=1)
            places_MQ = torch.cat([places_MQ, places], dim=1)
            kept = alike_MQ.topk(min(CANDIDATES, alike_MQ.shape[1]), dim=1)
            alike_MQ, places_MQ = kept.values, places_MQ.gather(1, kept.indices)
        indices_MQ = torch.where(alike_MQ > -torch.inf, places_MQ // ways, -1)
        return indices_MQ, places_MQ % ways

    def _compared(self, queries_MCHW: Tensor, indices_MQ: Tensor, orientations_MQ: Tensor) -> Nearest:
        """Compare fine pictures of queries with those of their candidates."""
        turned_MSCHW = torch.stack(orientations(averaged(queries_MCHW, FINE_PX)), dim=1)
        count, candidates = indices_MQ.shape
        distances_MQ = torch.full((count, max(1, candidates)), torch.inf, device=queries_MCHW.device)
        step = max(1, _CHUNK_VALUES // (self._values * max(1, candidates)))
        for start in range(0, count, step) if candidates else ():
            rows = torch.arange(start, min(start + step, count), device=queries_MCHW.device)
            indices_B = indices_MQ[rows].flatten()
            found_BCHW = averaged(self._images.take(indices_B.clamp_min(0).cpu())[0], FINE_PX)
            queries_BCHW = turned_MSCHW[rows[:, None], orientations_MQ[rows]].flatten(0, 1)
            distances_B = slid_distance(queries_BCHW, found_BCHW).masked_fill(indices_B < 0, torch.inf)
            distances_MQ[rows] = distances_B.view(len(rows), -1)
        best = distances_MQ.min(dim=1)
        if not candidates:
            return Nearest(best.values.cpu(), torch.full((count,), -1))
        return Nearest(best.values.cpu(), indices_MQ.gather(1, best.indices[:, None])[:, 0].cpu())


def averaged(pixels_NCHW: Tensor, largest_px: int) -> Tensor:
    """Area averages in [0, 1], float32, with at most `largest_px` a side: [N, C, H / k, W / k] for whole k."""
    height, width = (side // ceil(side / largest_px) for side in pixels_NCHW.shape[2:])
    images_NCHW = pixels_NCHW.float() / 255
    if (height, width) == tuple(images_NCHW.shape[2:]):
        return images_NCHW
    return F.adaptive_avg_pool2d(images_NCHW, (height, width))


def orientations(images_NCHW: Tensor) -> list[Tensor]:
    """The images turned and mirrored: 8 ways where H = W, else the 4 that keep the shape. The first is as it is."""
    quarters = range(4) if images_NCHW.shape[2] == images_NCHW.shape[3] else (0, 2)
    return [mirror.rot90(k, (2, 3)) for mirror in (images_NCHW, images_NCHW.flip(3)) for k in quarters]


def standardised(values_NP: Tensor) -> Tensor:
    """Each row at mean 0 and, where it is not flat, deviation 1."""
    centred_NP = values_NP - values_NP.mean(1, keepdim=True)
    return centred_NP / (centred_NP * centred_NP).mean(1, keepdim=True).sqrt().clamp_min(FLAT)


def slid_distance(images_BCHW: Tensor, others_BCHW: Tensor) -> Tensor:
    """Distance of each image's middle to that part of the other picture, at any shift, that is most like it: [B].

    The middle is what is left within a margin of one pixel for every SHIFT of the side, rounded.
    """
    down, right = (round(side / SHIFT) for side in images_BCHW.shape[2:])
    height, width = images_BCHW.shape[2] - 2 * down, images_BCHW.shape[3] - 2 * right
    middle_BCHW = images_BCHW[:, :, down : down + height, right : right + width]
    middle_BCHW = standardised(middle_BCHW.flatten(1)).view(middle_BCHW.shape)
    own_square_B11 = (middle_BCHW * middle_BCHW).mean((1, 2, 3))[:, None, None]
    # Without the picture's own mean, so that the difference of squares below keeps its digits.
    others_BCHW = others_BCHW - others_BCHW.mean((1, 2, 3), keepdim=True)
    # Of each part of the other picture, [B, 1 + 2 down, 1 + 2 right]: mean, deviation, product with the middle.
    mean_BYX = F.avg_pool2d(others_BCHW.mean(1, keepdim=True), (height, width), 1)[:, 0]
    square_BYX = F.avg_pool2d((others_BCHW * others_BCHW).mean(1, keepdim=True), (height, width), 1)[:, 0]
    deviation_BYX = (square_BYX - mean_BYX.square()).clamp_min(0).sqrt()
    scale_BYX = deviation_BYX.clamp_min(FLAT)
    # The middle has mean 0, so the part's mean drops out of the product.
    product_BYX = torch.empty_like(mean_BYX)
    for y in range(2 * down + 1):
        for x in range(2 * right + 1):
            part_BCHW = others_BCHW[:, :, y : y + height, x : x + width]
            product_BYX[:, y, x] = (middle_BCHW * part_BCHW).mean((1, 2, 3))
    squared_BYX = own_square_B11 + (deviation_BYX / scale_BYX).square() - 2 * product_BYX / scale_BYX
    return squared_BYX.clamp_min(0).sqrt().flatten(1).amin(1)
