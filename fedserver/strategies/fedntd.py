"""FedNTD: FedAvg of sites that keep what the global model says of the classes which an image does not have.

Source: Lee et al. 2022, "Preservation of the Global Knowledge by Not-True Distillation in Federated Learning",
arXiv:2106.03097.
"""

from typing import ClassVar

from pydantic import Field

from fedcore.plan import Options as PlanOptions
from fedserver.strategies.base import AdjustableOptions, Strategy, StrategyOptions


class FedNTDOptions(AdjustableOptions):
    """`beta` weighs the distillation, `temperature` softens it; `beta` = 0 is FedAvg."""

    beta: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0)


class FedNTD(Strategy):
    """Federated averaging with not-true distillation."""

    name: ClassVar[str] = "fedntd"
    Options: ClassVar[type[StrategyOptions]] = FedNTDOptions
    options: FedNTDOptions

    @property
    def objective(self) -> str:
        """Cross-entropy plus not-true distillation."""
        return "ntd"

    @property
    def objective_options(self) -> PlanOptions:
        """Distillation and logit adjustment."""
        return self.options.model_dump(include={"beta", "temperature", "logit_adjustment"})
