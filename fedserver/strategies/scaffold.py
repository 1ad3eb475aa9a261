"""SCAFFOLD: control variates take the sites' drift out of their gradients.

The coordinator keeps c, the mean of the sites' variates, as tensors `variate/NAME`, and sends it with the model. An
update carries how far the site's own variate moved, `aux/variate/NAME`.

Source: Karimireddy et al. 2020, "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
arXiv:1910.06378, Algorithm 1, option II. Different from it: with `weighting` "examples" variates weigh as their
sites do, so that c stays the gradient of what is minimised; "uniform" is the paper's.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from fedcore.errors import PlanError
from fedcore.plan import Options as PlanOptions
from fedcore.plan import Plan
from fedcore.tensor_file import EXTRA_PREFIX, TensorSpec
from fedserver.strategies.base import (
    AdjustableOptions,
    MergeRequest,
    MergeResult,
    Strategy,
    StrategyOptions,
)

if TYPE_CHECKING:
    from torch import Tensor

    from fedserver.server_step import ServerTensor

# The slot of the coordinator's state, and the kind of the updates' extras.
VARIATE = "variate"


class ScaffoldOptions(AdjustableOptions):
    """`server_learning_rate` scales the step from the old global model to the sites' mean."""

    server_learning_rate: float = Field(1.0, gt=0)


class Scaffold(Strategy):
    """Federated averaging with control variates."""

    name: ClassVar[str] = "scaffold"
    Options: ClassVar[type[StrategyOptions]] = ScaffoldOptions
    options: ScaffoldOptions
    shares_state: ClassVar[bool] = True

    @property
    def objective(self) -> str:
        """Cross-entropy with a corrected gradient."""
        return "scaffold"

    @property
    def objective_options(self) -> PlanOptions:
        """The logit adjustment."""
        return {"logit_adjustment": self.options.logit_adjustment}

    def check(self, plan: Plan) -> None:
        """Variates are read off the path of SGD. Raises PlanError for another optimiser."""
        if plan.training.optimizer != "sgd":
            raise PlanError(
                f"strategy 'scaffold': training.optimizer is '{plan.training.optimizer}', expected 'sgd'",
                hint="a variate is the distance over learning rate and steps, which says nothing under Adam",
            )

    def update_extras(self, specs: Sequence[TensorSpec], parameters: Collection[str]) -> list[TensorSpec]:
        """The change of the site's variate, for every trained tensor."""
        return [
            TensorSpec(f"{EXTRA_PREFIX}{VARIATE}/{spec.name}", spec.dtype, spec.shape)
            for spec in specs
            if spec.name in parameters
        ]

    def state_specs(self, specs: Sequence[TensorSpec], parameters: Collection[str]) -> list[TensorSpec]:
        """The server's variate, for every trained tensor."""
        return [replace(spec, name=f"{VARIATE}/{spec.name}") for spec in specs if spec.name in parameters]

    def merge(self, request: MergeRequest) -> MergeResult:
        """Average models and variates. Raises what `merge_with_step` raises."""
        from fedserver.server_step import merge_with_step

        return merge_with_step(request, self.weights, self._step, [VARIATE])

    def _step(self, tensor: "ServerTensor") -> "tuple[Tensor, Mapping[str, Tensor]]":
        """x + rate * (mean - x), and c + |S|/N * (mean change of the variates)."""
        moved = tensor.start + self.options.server_learning_rate * (tensor.mean - tensor.start)
        change = tensor.participation * tensor.extras[VARIATE]
        before = tensor.slots.get(VARIATE)
        return moved, {VARIATE: change if before is None else before + change}
