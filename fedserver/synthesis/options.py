"""How impressions are made: typed options, read by the control process too, so without torch."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

# The most optimisation steps that a plan may ask for in one pass, and passes in one round.
MAX_STEPS = 100_000
MAX_PASSES = 1_000
MAX_JITTER_PX = 64
# "auto" shifts by up to so much of the shorter side: 2 of 28 pixels.
JITTER_SHARE = 1 / 14

# Steps in a pass where the plan says "auto": from noise, and for a bank of which most images are warm.
COLD_STEPS = 100
WARM_STEPS = 25


class SynthesisOptions(BaseModel):
    """Options of the synthesis engine. Losses are means over images, so no option depends on the batch size.

    When and how many is in the plan's section `synthesis`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # -- when -----------------------------------------------------------------------------------
    # True: while sites train, through the model that these start from, for the round after; the coordinator's work
    # then costs no time where it has a processor of its own. False: after aggregation, for the next round.
    overlap: bool = True

    # -- the loop -------------------------------------------------------------------------------
    # Steps on each batch of images in a pass, and passes over all images; the dual variable moves after each.
    # "auto": 100 from noise, 25 for what is kept of a bank. 0 leaves the start as it is (virtual noise images).
    steps: int | Literal["auto"] = "auto"
    dual_passes: int = Field(1, ge=1, le=MAX_PASSES)
    # Seconds that a round's optimisation may take: measured on a few steps and turned into a step count before
    # the work starts, so identical results need the same machine. None: `steps` decides, and nothing is timed.
    time_budget_s: float | None = Field(None, gt=0)
    optimizer: Literal["adam", "sgd"] = "adam"
    # In units of the normalised image; with "sgd", of the gradient of the batch-mean loss (published: 100).
    image_lr: float = Field(0.1, gt=0)
    # What moves: pixels, as published, or the coefficients of a cosine transform, low frequencies first.
    space: Literal["spectrum", "pixels"] = "pixels"
    image_schedule: Literal["constant", "cosine"] = "cosine"
    batch_size: int = Field(160, ge=1, le=65536)
    # Largest shift in pixels of the whole batch, drawn each step ("auto": 1/14 of the shorter side); whether half of
    # the steps see it mirrored, which not every kind of image bears.
    jitter: int | Literal["auto"] = 0
    flip: bool = False

    # -- start and bank -------------------------------------------------------------------------
    # "smooth": low-frequency noise; "white": independent pixels, as published; "generator": what an untrained
    # generator makes of class-wise noise (VHL); "images": the operator's public images in `start_images`.
    start: Literal["smooth", "white", "generator", "images"] = "smooth"
    # An npz on the coordinator's disk: `images` uint8 [N, H, W, C] (and, if there, `labels` [N]).
    start_images: str | None = None
    # Whether a round starts from the bank before it; if so, the share of each class's images that is made anew
    # (the oldest first), and after how many rounds an image leaves in any case.
    warm_start: bool = True
    refresh: float = Field(0.2, ge=0, le=1)
    max_age_rounds: int = Field(10, ge=1)

    # -- terms ----------------------------------------------------------------------------------
    fit: Literal["cross_entropy", "margin"] = "cross_entropy"
    fit_weight: float = Field(1.0, ge=0)
    # In logits; of `fit = "margin"`.
    margin: float = Field(4.0, gt=0)
    # The augmented Lagrangian of Arya et al.: its weight, the head's weight decay that is taken as stationary,
    # the penalty, and whether the residual is relative (ours: at most 1) or as published.
    stationarity: float = Field(0.5, ge=0)
    gamma: float = Field(0.01, ge=0)
    rho: float = Field(1.0, ge=0)
    stationarity_scale: Literal["relative", "published"] = "relative"
    # Distance of feature statistics to those that BatchNorm has stored. None: 0.1 where the model has
    # BatchNorm. The first layer counts so many times.
    batch_norm: float | None = Field(None, ge=0)
    first_layer_weight: float = Field(10.0, gt=0)
    # Mean squared slope (difference of neighbouring pixels at 28 pixels a side); mean squared pixel.
    total_variation: float = Field(10.0, ge=0)
    l2: float = Field(0.0, ge=0)
    # Disagreement of this and the last global model; difference of features within a class.
    disagreement: float = Field(0.0, ge=0)
    diversity: float = Field(0.0, ge=0)

    # -- gate and readiness ---------------------------------------------------------------------
    # Whether impressions are checked before they leave, and the checks' limits (see `gate.py`).
    gate: bool = True
    min_confidence: float = Field(0.0, ge=0, le=1)
    duplicate_distance: float = Field(0.05, ge=0)
    max_saturated: float = Field(0.8, gt=0, le=1)
    # The way from chance (0) to perfect (1) that the validated accuracy must have come before the first
    # impressions are made; 0 never waits. "auto" is 0.25, and 0 where the plan sets its warm-up in rounds.
    worth_remembering: float | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.steps, int) and not 0 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps is {self.steps}, expected 'auto' or 0 to {MAX_STEPS}")
        if isinstance(self.jitter, int) and not 0 <= self.jitter <= MAX_JITTER_PX:
            raise ValueError(f"jitter is {self.jitter}, expected 'auto' or 0 to {MAX_JITTER_PX} pixels")
        worth = self.worth_remembering
        if isinstance(worth, float | int) and not 0 <= worth < 1:
            raise ValueError(f"worth_remembering is {worth}, expected 'auto' or at least 0 and below 1")
        if (self.start == "images") != (self.start_images is not None):
            raise ValueError("start = 'images' and start_images go together: the file with public images")
        return self

    def shift_px(self, height: int, width: int) -> int:
        """Largest shift, in pixels, of images of that size."""
        if self.jitter == "auto":
            return min(MAX_JITTER_PX, round(min(height, width) * JITTER_SHARE))
        return self.jitter

    def planned_steps(self, *, warm: bool) -> int:
        """Steps in a pass; `warm` for images that were optimised in an earlier round."""
        if self.steps == "auto":
            return WARM_STEPS if warm else COLD_STEPS
        return self.steps
