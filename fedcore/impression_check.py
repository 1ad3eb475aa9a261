"""What a site's check of the impressions found, as it travels and as it stands in records. No torch."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

_LARGEST = 1e300


class ImpressionCheck(BaseModel):
    """How near the impressions came to a site's own images, and how many it therefore did not train on.

    Distances are to the nearest training image: in pixels from 0, the same picture, to 2 (1.41: nothing in common); in
    features of the round's global model relative to the training images' own spread. An impression at or below a limit is
    suspicious: 99 % of the site's held-out images stay further away. `mean_distance` and `covariance_distance` compare the
    features of impressions and of training images, class by class; 0 is alike. None: could not be told. How each is
    computed stands in `fedagent/impression_check.py`.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="forbid")

    num_checked: int = Field(ge=1)
    # Refused, each for the first reason that holds.
    num_near_in_pixels: int = Field(ge=0)
    num_near_in_features: int = Field(ge=0)
    num_not_finite: int = Field(ge=0)
    pixel_limit: float = Field(ge=0, le=_LARGEST)
    pixel_smallest: float = Field(ge=0, le=_LARGEST)
    pixel_median: float = Field(ge=0, le=_LARGEST)
    feature_limit: float | None = Field(None, ge=0, le=_LARGEST)
    feature_smallest: float | None = Field(None, ge=0, le=_LARGEST)
    feature_median: float | None = Field(None, ge=0, le=_LARGEST)
    mean_distance: float | None = Field(None, ge=0, le=_LARGEST)
    covariance_distance: float | None = Field(None, ge=0, le=_LARGEST)

    @property
    def num_refused(self) -> int:
        """Impressions that the site did not train on."""
        return self.num_near_in_pixels + self.num_near_in_features + self.num_not_finite

    @property
    def num_trained(self) -> int:
        """Impressions that were left."""
        return self.num_checked - self.num_refused

    @property
    def reason(self) -> str:
        """Why impressions were refused; empty if none was."""
        near = f"nearest {self.pixel_smallest:.2f}, limit {self.pixel_limit:.2f}"
        counts = [
            (self.num_near_in_pixels, f"too near a training image ({near})"),
            (self.num_near_in_features, "too near a training image in features"),
            (self.num_not_finite, "with features that are not finite"),
        ]
        told = ", ".join(f"{count} {what}" for count, what in counts if count)
        return f"{self.num_refused} of {self.num_checked} impressions refused: {told}" if told else ""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_refused > self.num_checked:
            raise ValueError(
                f"{self.num_refused} impressions refused of {self.num_checked} that were checked"
            )
        return self
