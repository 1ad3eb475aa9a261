"""A site's own check of the impressions that it gets, before it trains on them: does one give a training image away?

An impression that comes nearer to a training image than 99 % of the site's held-out images do is refused. What decides is
the distance in pixels (`image_distance`), which finds copies that were turned, mirrored, shifted by a pixel, encoded again,
blurred or faded. Nearness in features of the round's global model refuses nothing alone: an impression may rightly stand in
the middle of a class, and there every point is near a training image (on BloodMNIST 20 to 30 % of class means and of means
of 8 training images' features are below such a limit). It counts where pixels agree: nearer than half of the held-out
images. So a copy turned by 10 degrees is caught more often than by pixels. What was measured stands in docs/privacy.md.

Feature distances are Euclidean, in units of the training images' root mean square distance to their mean.

Sources: held-out images as the measure: Meehan et al. 2020, "A Non-Parametric Test to Detect Data-Copying in Generative
Models", arXiv:2004.05675; that a distance means something only beside those of other images: Carlini et al. 2023,
"Extracting Training Data from Diffusion Models", arXiv:2301.13188.

Legend: M impressions, N training images, T of them compared in features, R references (held-out images), C channels,
H x W pixels, D features, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedagent.image_distance import Nearest, PictureIndex, Tick
from fedagent.resident import ResidentImages
from fedcore.data import LabelledImages
from fedcore.impression_check import ImpressionCheck

# The share of held-out images that come nearer to a training image than an impression may.
QUANTILE = 0.01
# Below so many held-out images, training images take their place, each compared with the others.
MIN_HELD_OUT = 20
# At most so many references in pixels, and in features; and so many training images in features, beside those that are
# nearest in pixels to an impression or a reference. Drawn from all alike, with the seed below, so the same in every round.
MAX_REFERENCES = 1000
MAX_FEATURE_REFERENCES = 256
MAX_FEATURE_IMAGES = 512
SAMPLE_SEED = 0
# Two images this near are one: a reference that repeats a training image says nothing of how near different ones come.
SAME = 0.02
# The limit where a site has no two images to learn one from; a copy stored as JPEG of quality 75 comes to 0.08.
LIMIT_WITHOUT_REFERENCES = 0.1


@dataclass(frozen=True, slots=True)
class SitePictures:
    """What a site's images say by themselves, whatever the model: computed once.

    `limit` and `middle` are pixel distances: an impression at or below `limit` is refused, one at or below `middle` if its
    features say so too. `references` uint8 [R, C, H, W] are those that serve in features too, `nearest` [R] their nearest
    training images, `own` [R] the training image that each is itself, or None if they are held-out images.
    """

    index: PictureIndex
    limit: float
    middle: float
    references: Tensor
    nearest: Tensor
    own: Tensor | None

    @classmethod
    def of(cls, train: ResidentImages, held_out: Sequence[LabelledImages], tick: Tick) -> "SitePictures":
        """Compare the references with every training image. `train` holds at least one image."""
        index = PictureIndex(train, tick)
        own = None
        if sum(len(part) for part in held_out) >= MIN_HELD_OUT:
            references = _drawn(held_out)
        else:
            own = _sample(len(train), MAX_REFERENCES)
            references = train.take(own)[0].cpu()
        found = index.nearest(references, tick, itself=own)
        apart = (found.distances > SAME) & found.distances.isfinite()
        limit, middle = _limits(found.distances[apart])
        return cls(
            index,
            LIMIT_WITHOUT_REFERENCES if limit is None else limit,
            LIMIT_WITHOUT_REFERENCES if middle is None else middle,
            references[apart][:MAX_FEATURE_REFERENCES].clone(),
            found.indices[apart][:MAX_FEATURE_REFERENCES],
            None if own is None else own[apart][:MAX_FEATURE_REFERENCES],
        )


# Pixels uint8 [B, C, H, W], on any device, to the model's features float32 [B, D] on the CPU.
FeaturesOf = Callable[[Tensor], Tensor]


def check_impressions(
    pixels_MCHW: Tensor,
    labels_M: Tensor,
    train: ResidentImages,
    site: SitePictures,
    features_of: FeaturesOf,
    tick: Tick,
) -> tuple[Tensor, ImpressionCheck]:
    """Which impressions may be trained on, bool [M] on the CPU, and what was found. M is at least 1.

    An impression whose features are not finite is refused; training images and references with such features are left
    out, and where none is left, pixels decide alone.
    """
    found = site.index.nearest(pixels_MCHW, tick)
    near_M = found.distances <= site.limit
    features_MD = features_of(pixels_MCHW)
    finite_M = features_MD.isfinite().all(1)
    view = _FeatureView.of(train, site, found, features_of)
    limit = smallest = median = mean = covariance = None
    alike_M = torch.zeros_like(near_M)
    if view is not None:
        limit = view.limit
        distances_M = view.distances(features_MD)
        if limit is not None:
            alike_M = (distances_M <= limit) & (found.distances <= site.middle)
        if bool(finite_M.any()):
            smallest, median = (float(f(distances_M[finite_M])) for f in (torch.min, torch.median))
            labels = labels_M.cpu()[finite_M]
            mean, covariance = class_distances(
                view.sample, view.sample_labels, features_MD[finite_M], labels, view.spread
            )
    figures = ImpressionCheck(
        num_checked=len(pixels_MCHW),
        num_near_in_pixels=int(near_M.sum()),
        num_near_in_features=int((alike_M & ~near_M).sum()),
        num_not_finite=int((~finite_M & ~near_M).sum()),
        pixel_limit=site.limit,
        pixel_smallest=float(found.distances.min()),
        pixel_median=float(found.distances.median()),
        feature_limit=limit,
        feature_smallest=smallest,
        feature_median=median,
        mean_distance=mean,
        covariance_distance=covariance,
    )
    return finite_M & ~near_M & ~alike_M, figures


@dataclass(frozen=True, slots=True)
class _FeatureView:
    """Training images and references as the round's model sees them; rows are finite."""

    # [T, D], and the limit below which a distance to the nearest of them is suspicious; None without references.
    features: Tensor
    limit: float | None
    # Root mean square distance of `sample`, drawn from all training images alike, to its mean; never 0.
    spread: float
    sample: Tensor
    sample_labels: Tensor

    @classmethod
    def of(
        cls, train: ResidentImages, site: SitePictures, found: Nearest, features_of: FeaturesOf
    ) -> "_FeatureView | None":
        """None if no training image has finite features."""
        sample = _sample(len(train), MAX_FEATURE_IMAGES)
        chosen_T = torch.unique(torch.cat([sample, found.indices, site.nearest]))
        pixels, labels = train.take(chosen_T)
        features = features_of(pixels)
        finite = features.isfinite().all(1)
        features, labels, chosen_T = features[finite], labels.cpu()[finite], chosen_T[finite]
        drawn = torch.isin(chosen_T, sample)
        if not bool(drawn.any()):
            return None
        centred = features[drawn] - features[drawn].mean(0)
        spread = max(float(centred.square().sum(1).mean().sqrt()), 1e-12)
        view = cls(features, None, spread, features[drawn], labels[drawn])
        if not len(site.references):
            return view
        seen = features_of(site.references)
        away = view._all_distances(seen)
        if site.own is not None:
            away = away.masked_fill(site.own[:, None] == chosen_T, torch.inf)
        nearest = away.amin(1)
        limit, _ = _limits(nearest[nearest.isfinite()])
        return cls(features, limit, spread, view.sample, view.sample_labels)

    def distances(self, features_MD: Tensor) -> Tensor:
        """Distance to the nearest training image, [M]; NaN where a feature is not finite."""
        return self._all_distances(features_MD).amin(1)

    def _all_distances(self, features_MD: Tensor) -> Tensor:
        # By a product of matrices, which float64 keeps exact enough for a copy to come to 0.
        return torch.cdist(features_MD.double(), self.features.double()).float() / self.spread


def class_distances(
    real_ND: Tensor, real_labels_N: Tensor, made_MD: Tensor, made_labels_M: Tensor, spread: float
) -> tuple[float | None, float | None]:
    """How unlike the features of impressions are to those of training images: of class means, and of covariances.

    The first is the squared distance of the means in units of `spread` squared; the second the Frobenius norm of the
    difference of the covariances within classes, relative to that of the training images'. Both go over the classes that the
    site and the bank have in common, each alike; None where there is none (covariance: none with two images on both
    sides). The covariances never stand in memory, [D, D]: products of their factors do, [N, M].
    """
    common = [k for k in torch.unique(real_labels_N).tolist() if bool((made_labels_M == k).any())]
    if not common:
        return None, None
    squared, real_rows, made_rows = [], [], []
    for label in common:
        real, made = real_ND[real_labels_N == label].double(), made_MD[made_labels_M == label].double()
        squared.append(float((real.mean(0) - made.mean(0)).square().sum()) / spread**2)
        if min(len(real), len(made)) > 1:
            real_rows.append((real - real.mean(0)) / (len(real) - 1) ** 0.5)
            made_rows.append((made - made.mean(0)) / (len(made) - 1) ** 0.5)
    covariance = None
    if real_rows:
        real, made = torch.cat(real_rows), torch.cat(made_rows)
        # For C = A'A and E = B'B: |C - E|^2 = |AA'|^2 - 2 |AB'|^2 + |BB'|^2, in Frobenius norms.
        own, cross, other = (
            float((a @ b.T).square().sum()) for a, b in ((real, real), (real, made), (made, made))
        )
        if own > 0:
            covariance = (max(0.0, own - 2 * cross + other) / own) ** 0.5
    return sum(squared) / len(squared), covariance


def _limits(distances: Tensor) -> tuple[float | None, float | None]:
    """The quantile below which a distance is suspicious, and the median; None of no distances."""
    if not len(distances):
        return None, None
    return float(distances.quantile(QUANTILE)), float(distances.median())


def _sample(count: int, most: int) -> Tensor:
    """Up to `most` of `count` indices, drawn alike with the fixed seed, in random order: int64."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(SAMPLE_SEED))[:most]


def _drawn(parts: Sequence[LabelledImages]) -> Tensor:
    """Up to MAX_REFERENCES images of several sets, uint8 [R, C, H, W], in random order."""
    counts = [len(part) for part in parts]
    chosen = _sample(sum(counts), MAX_REFERENCES).numpy()
    ends = np.cumsum(counts)
    images = []
    for i in chosen:
        part = int(np.searchsorted(ends, i, side="right"))
        images.append(parts[part].images[i - (ends[part] - counts[part])])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
