"""FedAvg: sites minimise cross-entropy on their own images; the coordinator averages their models.

Source: McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
arXiv:1602.05629, Algorithm 1.
"""

from typing import ClassVar

from fedcore.plan import Options as PlanOptions
from fedserver.strategies.base import AdjustableOptions, Strategy, StrategyOptions


class FedAvg(Strategy):
    """Federated averaging, weighted by example count or uniformly."""

    name: ClassVar[str] = "fedavg"
    Options: ClassVar[type[StrategyOptions]] = AdjustableOptions
    options: AdjustableOptions

    @property
    def objective(self) -> str:
        """Cross-entropy."""
        return "cross_entropy"

    @property
    def objective_options(self) -> PlanOptions:
        """The logit adjustment."""
        return {"logit_adjustment": self.options.logit_adjustment}
