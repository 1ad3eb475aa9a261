"""Two sections of a plan against bad updates: `[gate]` shortens or refuses them, `[aggregation]` limits their pull.

Only the coordinator acts upon them; sites get a plan without them (`Plan.to_site_json`).
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GateSection(_Section):
    """What an update must pass before it is merged; finite tensors of the model's shapes are always asked for."""

    # Whether an update's distance from the model that it started from is held against the round's median distance, and
    # how many times the median it may be. Parameters and what the strategy adds, each held against its own median, are
    # shortened beyond `norm_factor` to the longest that is within it: where sites differ much, a site that knows more than
    # the others moves further. Beyond `refuse_factor` (or `norm_factor`, if that is larger) the update is refused.
    # BatchNorm statistics follow a site's images and are honest at several medians: refused beyond `statistics_factor`.
    # With fewer than three updates there is no median to speak of, and nothing is shortened or refused.
    check_norm: bool = True
    norm_factor: float = Field(6.0, gt=1)
    refuse_factor: float = Field(30.0, gt=1)
    statistics_factor: float = Field(50.0, gt=1)
    # Whether the images that a site says it trained on are held against the number that it registered with, n: from
    # n / (1 + tolerance) to n * (1 + tolerance) will do.
    check_examples: bool = True
    examples_tolerance: float = Field(0.5, ge=0)


class MeanRule(_Section):
    """The strategy's weighted mean (McMahan et al. 2017)."""

    rule: Literal["mean"] = "mean"


class MedianRule(_Section):
    """The median of every coordinate (Yin et al. 2018); every site counts the same."""

    rule: Literal["median"]


class TrimmedMeanRule(_Section):
    """The mean of every coordinate without its `tolerate` smallest and largest values (Yin et al. 2018); every site
    counts the same."""

    rule: Literal["trimmed_mean"]
    tolerate: int = Field(1, ge=1)

    @property
    def least_sites(self) -> int:
        """The smallest round in which so many bad updates do no harm."""
        return 2 * self.tolerate + 1


class MultiKrumRule(_Section):
    """The weighted mean of the updates that lie nearest to their neighbours, `tolerate` fewer than there are (Blanchard
    et al. 2017)."""

    rule: Literal["multi_krum"]
    tolerate: int = Field(1, ge=1)

    @property
    def least_sites(self) -> int:
        """The smallest round in which so many bad updates do no harm."""
        return 2 * self.tolerate + 3


class NormClipRule(_Section):
    """The weighted mean of updates that are shortened to `clip_factor` times the round's median length (Sun et al. 2019)."""

    rule: Literal["norm_clip"]
    clip_factor: float = Field(1.0, gt=0)


AggregationSection = Annotated[
    MeanRule | MedianRule | TrimmedMeanRule | MultiKrumRule | NormClipRule, Field(discriminator="rule")
]
