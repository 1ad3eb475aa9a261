"""FedProx: FedAvg whose sites are held near the global model by a proximal term.

Source: Li et al. 2020, "Federated Optimization in Heterogeneous Networks", arXiv:1812.06127, Algorithm 2.
"""

from typing import ClassVar

from pydantic import Field

from fedcore.plan import Options as PlanOptions
from fedserver.strategies.base import AdjustableOptions, Strategy, StrategyOptions


class FedProxOptions(AdjustableOptions):
    """FedProx's options; `mu` = 0 is FedAvg."""

    mu: float = Field(0.01, ge=0)


class FedProx(Strategy):
    """Federated averaging of proximally regularised sites."""

    name: ClassVar[str] = "fedprox"
    Options: ClassVar[type[StrategyOptions]] = FedProxOptions
    options: FedProxOptions

    @property
    def objective(self) -> str:
        """Cross-entropy plus mu/2 times the squared distance to the global model."""
        return "proximal"

    @property
    def objective_options(self) -> PlanOptions:
        """The proximal weight and the logit adjustment."""
        return self.options.model_dump(include={"mu", "logit_adjustment"})
