"""FedAvg in which every site weighs the same, however many images it has.

Source: McMahan et al. 2017, arXiv:1602.05629, with the weights 1/N of Li et al. 2020, "On the Convergence of FedAvg on
Non-IID Data", arXiv:1907.02189, scheme II.
"""

from typing import ClassVar

from fedserver.strategies.base import AdjustableOptions, StrategyOptions, Weighting
from fedserver.strategies.fedavg import FedAvg


class FedAvgUniformOptions(AdjustableOptions):
    """FedAvg's options with another default."""

    weighting: Weighting = "uniform"


class FedAvgUniform(FedAvg):
    """Federated averaging with equal weights."""

    name: ClassVar[str] = "fedavg_uniform"
    Options: ClassVar[type[StrategyOptions]] = FedAvgUniformOptions
