"""FedImpres, ours: the coordinator keeps a bank of images that carry what the global model knows; sites train
on what they lack of it beside their own images, with their own class frequencies adjusted for.

A site that has few classes forgets the others while it trains. Two things counter that, and measured together
they bring more than either: logit adjustment, which stops real images from pushing the absent classes down, and
impressions of those classes, which hold them up. The bank is class-balanced, warm-started each round and
refreshed in part, and begins once the model is worth remembering.

Sources: Arya et al. 2024, "FedImpres: Federated Impressions", arXiv:2409.07351, for impressions and the
stationarity term (`fedimpres_paper` is that method as published); Yin et al. 2020, DeepInversion; Menon et al.
2021, logit adjustment, arXiv:2007.07314.
"""

from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from fedcore.errors import PlanError
from fedcore.plan import Options as PlanOptions
from fedcore.plan import Plan
from fedserver.strategies.base import Strategy, StrategyOptions
from fedserver.synthesis.options import SynthesisOptions


class FedImpresOptions(StrategyOptions, SynthesisOptions):
    """How impressions are made (see `SynthesisOptions`) and what sites do with them.

    The sites' options are those of the objective `impressions` (`fedagent/objectives/impressions.py`).
    """

    # Each site trains and evaluates with normalisation layers of its own (Li et al. 2021, FedBN, arXiv:2102.07623), for
    # sites whose cameras, stains or scanners differ. They are sent as well: impressions are made through their mean.
    local_norm: bool = False
    ratio: float = Field(1.0, ge=0, le=16)
    sampling: Literal["uniform", "lack"] = "lack"
    batchnorm: Literal["shared", "separate", "frozen_global"] = "shared"
    logit_adjustment: float = Field(1.0, ge=0)
    impression_weight: float = Field(0.5, ge=0)
    soft_weight: float = Field(0.0, ge=0)
    temperature: float = Field(2.0, gt=0)
    feature_weight: float = Field(0.0, ge=0)
    contrast_weight: float = Field(0.0, ge=0)
    contrast_temperature: float = Field(0.1, gt=0)
    ramp_from: int = Field(1, ge=1)
    ramp_rounds: int = Field(0, ge=0)


# What the sites need to know, in the objective's own names.
LOCAL_OPTIONS = tuple(
    name
    for name in FedImpresOptions.model_fields
    if name not in SynthesisOptions.model_fields
    and name not in StrategyOptions.model_fields
    and name != "local_norm"
)


class FedImpres(Strategy):
    """Federated averaging with logit adjustment and impressions."""

    name: ClassVar[str] = "fedimpres"
    Options: ClassVar[type[StrategyOptions]] = FedImpresOptions
    options: FedImpresOptions

    @property
    def objective(self) -> str:
        """Real images and impressions in one batch."""
        return "impressions"

    @property
    def objective_options(self) -> PlanOptions:
        """Weights, sampling and normalisation at the sites."""
        return {name: getattr(self.options, name) for name in LOCAL_OPTIONS}

    def check(self, plan: Plan) -> None:
        """Refuse layers that are frozen at statistics which are not the global model's. Raises PlanError."""
        options = self.options
        if options.batchnorm != "frozen_global":
            return
        why = ""
        if options.local_norm:
            why = "local_norm gives each site layers of its own"
        elif options.recalibrate is not False and options.ema > 0:
            why = "with recalibrate and ema sites start from a model that is not the one with measured statistics"
        if why:
            raise PlanError(
                f"strategy 'fedimpres': batchnorm is 'frozen_global', but {why}",
                hint="choose batchnorm = 'shared' or 'separate'",
            )

    def personal_tensors(self, names: Sequence[str], norm_names: Collection[str]) -> tuple[str, ...]:
        """Every tensor of a normalisation layer, in the model's order, with `local_norm`."""
        return tuple(name for name in names if name in norm_names) if self.options.local_norm else ()

    @property
    def synthesis(self) -> SynthesisOptions | None:
        """How impressions are made."""
        return self.options
