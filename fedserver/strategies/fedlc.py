"""FedLC: FedAvg of sites that calibrate their logits by their own class frequencies, which stay there.

Sources: Zhang et al. 2022, "Federated Learning with Label Distribution Skew via Logits Calibration",
arXiv:2209.00189, equation 7 (`calibration = "fourth_root"`); Ren et al. 2020, "Balanced Meta-Softmax",
arXiv:2007.10740 (`"log"`, the default: it needs no scale of its own).
"""

from typing import ClassVar, Literal

from pydantic import Field

from fedcore.plan import Options as PlanOptions
from fedserver.strategies.base import Strategy, StrategyOptions


class FedLCOptions(StrategyOptions):
    """`tau` scales the calibration; 0 is FedAvg."""

    tau: float = Field(1.0, ge=0)
    calibration: Literal["log", "fourth_root"] = "log"


class FedLC(Strategy):
    """Federated averaging with calibrated logits."""

    name: ClassVar[str] = "fedlc"
    Options: ClassVar[type[StrategyOptions]] = FedLCOptions
    options: FedLCOptions

    @property
    def objective(self) -> str:
        """Cross-entropy."""
        return "cross_entropy"

    @property
    def objective_options(self) -> PlanOptions:
        """The calibration's scale and form."""
        return {"logit_adjustment": self.options.tau, "calibration": self.options.calibration}
