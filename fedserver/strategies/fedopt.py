"""FedOpt: the coordinator takes the sites' mean as a step and hands it to an optimiser of its own.

The pseudo-gradient is mean - x. "momentum" is FedAvgM: m = beta1 m + mean - x, x += rate m. The adaptive ones divide
an average of it by the root of an average of its square. BatchNorm statistics keep their mean.

Sources: Reddi et al. 2021, "Adaptive Federated Optimization", arXiv:2003.00295, Algorithm 2 (without correction of the
averages' bias, as there); Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated
Visual Classification", arXiv:1909.06335 (momentum).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from fedcore.tensor_file import TensorSpec
from fedserver.strategies.base import AdjustableOptions, MergeRequest, MergeResult, StrategyOptions
from fedserver.strategies.fedavg import FedAvg

if TYPE_CHECKING:
    from torch import Tensor

    from fedserver.server_step import ServerTensor

FIRST, SECOND = "first_moment", "second_moment"
DEFAULT_RATES = {"momentum": 1.0, "adagrad": 0.01, "adam": 0.01, "yogi": 0.01}


class FedOptOptions(AdjustableOptions):
    """The server's optimiser. `momentum` with `beta1` = 0 and rate 1 is FedAvg."""

    server_optimizer: Literal["momentum", "adagrad", "adam", "yogi"] = "momentum"
    # 1.0 for momentum, 0.01 for the adaptive ones, where unset.
    server_learning_rate: float | None = Field(None, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    # Added to the root of the second moment; its square is where that starts.
    adaptivity: float = Field(1e-3, gt=0)


class FedOpt(FedAvg):
    """Federated averaging with a server-side optimiser."""

    name: ClassVar[str] = "fedopt"
    Options: ClassVar[type[StrategyOptions]] = FedOptOptions
    options: FedOptOptions

    @property
    def _slots(self) -> list[str]:
        return [FIRST] if self.options.server_optimizer == "momentum" else [FIRST, SECOND]

    def state_specs(self, specs: Sequence[TensorSpec], parameters: Collection[str]) -> list[TensorSpec]:
        """The moments of every trained tensor."""
        trained = [spec for spec in specs if spec.name in parameters]
        return [replace(spec, name=f"{slot}/{spec.name}") for slot in self._slots for spec in trained]

    def merge(self, request: MergeRequest) -> MergeResult:
        """Average, then step. Raises what `merge_with_step` raises."""
        from fedserver.server_step import merge_with_step

        return merge_with_step(request, self.weights, self._step, self._slots)

    def _step(self, tensor: "ServerTensor") -> "tuple[Tensor, Mapping[str, Tensor]]":
        options = self.options
        rate = options.server_learning_rate or DEFAULT_RATES[options.server_optimizer]
        change = tensor.mean - tensor.start
        before = tensor.slots.get(FIRST, change.new_zeros(()))
        if options.server_optimizer == "momentum":
            first = options.beta1 * before + change
            return tensor.start + rate * first, {FIRST: first}
        first = options.beta1 * before + (1 - options.beta1) * change
        second = self._second(tensor.slots.get(SECOND), change.square())
        moved = tensor.start + rate * first / (second.sqrt() + options.adaptivity)
        return moved, {FIRST: first, SECOND: second}

    def _second(self, before: "Tensor | None", square: "Tensor") -> "Tensor":
        """The second moment after a change whose square is `square`."""
        options = self.options
        if before is None:
            before = square.new_full(square.shape, options.adaptivity**2)
        if options.server_optimizer == "adagrad":
            return before + square
        if options.server_optimizer == "adam":
            return options.beta2 * before + (1 - options.beta2) * square
        return before - (1 - options.beta2) * square * (before - square).sign()
