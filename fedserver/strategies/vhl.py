"""VHL: every site trains beside its own images on the same labelled noise, and aligns its features to it by class.

The noise comes from an untrained generator at the coordinator, once, and reaches the sites like impressions, from the
second round on. It says nothing of anybody's images, and gives all sites the same classes to agree on.

Source: Tang et al. 2022, "Virtual Homogeneity Learning: Defending against Data Heterogeneity in Federated Learning",
arXiv:2206.02465, equation 8 (there the generator is an untrained StyleGAN).
"""

from typing import ClassVar

from pydantic import Field

from fedcore.plan import Options as PlanOptions
from fedserver.strategies.base import AdjustableOptions, Strategy, StrategyOptions
from fedserver.synthesis.options import SynthesisOptions


class VHLOptions(AdjustableOptions):
    """How much the noise counts at the sites; how many noise images there are says the plan's `synthesis.images`."""

    # Noise images to a real image in a batch, and the weight of one's cross-entropy beside a real image's.
    ratio: float = Field(1.0, gt=0, le=16)
    virtual_weight: float = Field(1.0, ge=0)
    # Weight and temperature of the supervised contrast that draws real images and noise of a class together.
    alignment: float = Field(1.0, ge=0)
    temperature: float = Field(0.07, gt=0)


class VHL(Strategy):
    """Federated averaging with shared virtual images."""

    name: ClassVar[str] = "vhl"
    Options: ClassVar[type[StrategyOptions]] = VHLOptions
    options: VHLOptions
    synthesises_once: ClassVar[bool] = True

    @property
    def objective(self) -> str:
        """Cross-entropy over real and virtual images, and their contrast: the objective of FedImpres' sites."""
        return "impressions"

    @property
    def objective_options(self) -> PlanOptions:
        """The noise in the place of impressions."""
        return {
            "ratio": self.options.ratio,
            "impression_weight": self.options.virtual_weight,
            "contrast_weight": self.options.alignment,
            "contrast_temperature": self.options.temperature,
            "logit_adjustment": self.options.logit_adjustment,
        }

    @property
    def synthesis(self) -> SynthesisOptions | None:
        """The generator's noise as it is: no step, no gate, whatever the model is worth."""
        return SynthesisOptions(start="generator", steps=0, gate=False, worth_remembering=0.0)
