"""What leaves the coordinator: impressions are checked one by one, and those that fail stay behind.

An impression that the model itself does not recognise teaches the sites a wrong label; a near-duplicate
teaches nothing and weighs double; one far outside the pixel statistics of the rest has run away. Pure
functions of tensors.

Legend: M images, C channels, H x W pixels, K classes, D features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fedserver.synthesis.options import SynthesisOptions

# Pixel statistics: lowest deviation of an image in grey levels, and how many (robust) deviations its mean and
# its deviation may lie from the bank's medians, none of which counts below a floor in grey levels.
MIN_CONTRAST = 1.0
MAX_DEVIATIONS = 6.0
DEVIATION_FLOOR = 8.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """`passed` bool [M], and how many failed each check (the first that they failed)."""

    passed: Tensor
    unrecognised: int
    unlikely: int
    duplicates: int

    @property
    def rejected(self) -> int:
        """Impressions that stay behind."""
        return self.unrecognised + self.unlikely + self.duplicates

    def describe(self) -> str:
        """`rejected 12 of 160 (10 not recognised, 2 near-duplicates)`; empty if all passed."""
        if not self.rejected:
            return ""
        counts = [
            (self.unrecognised, "not recognised"),
            (self.unlikely, "outside the pixel statistics"),
            (self.duplicates, "near-duplicates"),
        ]
        told = ", ".join(f"{count} {what}" for count, what in counts if count)
        return f"rejected {self.rejected} of {len(self.passed)} ({told})"


def inspect(
    pixels_MCHW: Tensor,
    labels_M: Tensor,
    logits_MK: Tensor,
    features_MD: Tensor,
    options: SynthesisOptions,
) -> Verdict:
    """Check impressions, pixels uint8 with the model's answers to them; everything on one device."""
    recognised_M = recognised(logits_MK, labels_M, options.min_confidence)
    likely_M = within_statistics(pixels_MCHW, options.max_saturated)
    sound_M = recognised_M & likely_M
    repeated_M = duplicates(pixels_MCHW, features_MD, labels_M, sound_M, options.duplicate_distance)
    return Verdict(
        passed=sound_M & ~repeated_M,
        unrecognised=int((~recognised_M).sum()),
        unlikely=int((recognised_M & ~likely_M).sum()),
        duplicates=int(repeated_M.sum()),
    )


def recognised(logits_MK: Tensor, labels_M: Tensor, min_confidence: float) -> Tensor:
    """Whether the model's first choice is the label, with at least that probability: bool [M]."""
    probability_M, choice_M = logits_MK.float().softmax(1).max(dim=1)
    return (choice_M == labels_M) & (probability_M >= min_confidence)


def within_statistics(pixels_MCHW: Tensor, max_saturated: float) -> Tensor:
    """Whether each image looks like the others in its plainest figures: bool [M].

    It has some contrast, not more than `max_saturated` of its values are black or white, and its mean and
    deviation lie within `MAX_DEVIATIONS` robust deviations of the bank's medians.
    """
    values_MP = pixels_MCHW.flatten(1).float()
    mean_M, deviation_M = values_MP.mean(1), values_MP.std(1, correction=0)
    saturated_M = ((values_MP == 0) | (values_MP == 255)).float().mean(1)
    return (
        (deviation_M >= MIN_CONTRAST)
        & (saturated_M <= max_saturated)
        & _near_the_median(mean_M)
        & _near_the_median(deviation_M)
    )


def duplicates(
    pixels_MCHW: Tensor, features_MD: Tensor, labels_M: Tensor, candidates_M: Tensor, distance: float
) -> Tensor:
    """Candidates that repeat an earlier candidate of their class: bool [M].

    Two images are near-duplicates if their root mean square difference in pixels, as a share of their common
    deviation from the bank's mean image, or the same of their features, is below `distance`. The first of a
    group of duplicates stays.
    """
    repeated_M = torch.zeros_like(candidates_M)
    kinds = (_relative_distances(pixels_MCHW.flatten(1)), _relative_distances(features_MD))
    near_MM = (torch.minimum(*kinds) < distance) & (labels_M[:, None] == labels_M[None, :])
    for i in range(len(labels_M)):
        if candidates_M[i]:
            repeated_M[i] = bool((near_MM[i, :i] & candidates_M[:i] & ~repeated_M[:i]).any())
    return repeated_M


def _relative_distances(values_MP: Tensor) -> Tensor:
    """||a - b|| over the root mean square distance of a vector to the mean of all: [M, M].

    Differences far below the bank's own spread are no differences, whatever the unit.
    """
    centred_MP = values_MP.double() - values_MP.double().mean(0)
    spread = centred_MP.square().sum(1).mean().sqrt().clamp_min(1e-12)
    return torch.cdist(centred_MP, centred_MP, compute_mode="donot_use_mm_for_euclid_dist") / spread


def _near_the_median(values_M: Tensor) -> Tensor:
    median = values_M.median()
    deviation = (values_M - median).abs().median().clamp_min(DEVIATION_FLOOR)
    return (values_M - median).abs() <= MAX_DEVIATIONS * deviation
