"""MOON: FedAvg of sites whose features are drawn to the global model's and away from their own last ones.

Source: Li et al. 2021, "Model-Contrastive Federated Learning", arXiv:2103.16257.
"""

from typing import ClassVar

from pydantic import Field

from fedcore.plan import Options as PlanOptions
from fedserver.strategies.base import AdjustableOptions, Strategy, StrategyOptions


class MoonOptions(AdjustableOptions):
    """`mu` weighs the contrast, `temperature` divides similarities; `mu` = 0 is FedAvg."""

    mu: float = Field(1.0, ge=0)
    temperature: float = Field(0.5, gt=0)


class Moon(Strategy):
    """Federated averaging with model-contrastive local training."""

    name: ClassVar[str] = "moon"
    Options: ClassVar[type[StrategyOptions]] = MoonOptions
    options: MoonOptions

    @property
    def objective(self) -> str:
        """Cross-entropy plus model contrast."""
        return "moon"

    @property
    def objective_options(self) -> PlanOptions:
        """Contrast and logit adjustment."""
        return self.options.model_dump(include={"mu", "temperature", "logit_adjustment"})
