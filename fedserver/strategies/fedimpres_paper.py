"""FedImpres as published: impressions remade each round by a short augmented Lagrangian, one cross-entropy.

Source: Arya et al. 2024, "FedImpres: Federated Impressions", arXiv:2409.07351, and its defaults: SGD with
learning rate 100 on the batch-mean loss and momentum 0.9, 10 steps in each of 3 dual passes, gamma = rho = 0.01,
batches of 32, hard labels, every bank made anew from its start, no check of what comes out. Different from it,
because the published form destroys training: impressions are mixed one to one with real images (there five to
one), and pixels are kept in their range. The start is noise: a public or a site's image never is by default.
"""

from typing import ClassVar, Literal

from pydantic import Field

from fedcore.plan import Options as PlanOptions
from fedserver.strategies.base import Strategy, StrategyOptions
from fedserver.synthesis.options import SynthesisOptions


class FedImpresPaperOptions(StrategyOptions, SynthesisOptions):
    """`SynthesisOptions` with the published values as defaults, and the sites' two numbers."""

    overlap: bool = False
    steps: int | Literal["auto"] = 10
    dual_passes: int = Field(3, ge=1, le=1000)
    optimizer: Literal["adam", "sgd"] = "sgd"
    image_lr: float = Field(100.0, gt=0)
    image_schedule: Literal["constant", "cosine"] = "constant"
    batch_size: int = Field(32, ge=1, le=65536)
    start: Literal["smooth", "white", "generator", "images"] = "white"
    warm_start: bool = False
    stationarity: float = Field(1.0, ge=0)
    rho: float = Field(0.01, ge=0)
    stationarity_scale: Literal["relative", "published"] = "published"
    batch_norm: float | None = Field(0.0, ge=0)
    total_variation: float = Field(0.0, ge=0)
    gate: bool = False
    worth_remembering: float | Literal["auto"] = 0.0
    # Impressions to a real image, and the weight of one's cross-entropy beside a real image's.
    ratio: float = Field(1.0, ge=0, le=16)
    impression_weight: float = Field(1.0, ge=0)


class FedImpresPaper(Strategy):
    """Federated averaging with impressions as published."""

    name: ClassVar[str] = "fedimpres_paper"
    Options: ClassVar[type[StrategyOptions]] = FedImpresPaperOptions
    options: FedImpresPaperOptions

    @property
    def objective(self) -> str:
        """One cross-entropy over real images and impressions."""
        return "impressions"

    @property
    def objective_options(self) -> PlanOptions:
        """The impressions' number and weight."""
        return {"ratio": self.options.ratio, "impression_weight": self.options.impression_weight}

    @property
    def synthesis(self) -> SynthesisOptions | None:
        """How impressions are made."""
        return self.options
