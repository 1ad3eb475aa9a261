"""The strategy `smoothed_fedavg`: federated averaging of sites that train on smoothed labels.

No torch here: the coordinator's control process imports this module.
"""

from typing import ClassVar

from pydantic import Field

from fedcore.plan import Options as PlanOptions
from fedserver.strategies.base import Strategy, StrategyOptions


class SmoothedFedAvgOptions(StrategyOptions):
    """`smoothing` goes to the sites' objective."""

    smoothing: float = Field(0.1, ge=0, lt=1)


class SmoothedFedAvg(Strategy):
    """FedAvg with another objective: the server's half of a pair."""

    name: ClassVar[str] = "smoothed_fedavg"
    Options: ClassVar[type[StrategyOptions]] = SmoothedFedAvgOptions
    options: SmoothedFedAvgOptions

    @property
    def objective(self) -> str:
        """The sites' half, by its entry point's name."""
        return "smoothed_cross_entropy"

    @property
    def objective_options(self) -> PlanOptions:
        """The sites' half gets the smoothing."""
        return {"smoothing": self.options.smoothing}
