"""What a strategy decides: what sites are asked to do, what each weighs, how updates become a model.

A strategy has two halves. The server's half is a class here; the sites' half is an objective of `fedagent`,
met by name and options only, because the two programs never import each other. The control process validates
a plan's strategy, so no module of this package imports torch at its top.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from fedcore.errors import PlanError
from fedcore.plan import Options as PlanOptions
from fedcore.plan import Plan, TransferSection
from fedcore.plan_robustness import AggregationSection, MeanRule
from fedcore.tensor_file import TensorSpec
from fedcore.update_verdict import MergeFigures
from fedserver.synthesis.options import SynthesisOptions

# What a site measures comes in one message.
MAX_STATISTICS_BYTES = 4 << 20
Weighting = Literal["examples", "uniform"]


class StrategyOptions(BaseModel):
    """Base of a strategy's options: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # "examples": a site weighs as many images as it trained on; "uniform": every site weighs the same.
    weighting: Weighting = "examples"
    # Average of the global model over rounds: the share that the average keeps in each (0.8: the last five rounds or
    # so). Sites train from the newest model; the average is what is evaluated, synthesised through and handed out.
    # 0 hands out the newest model itself.
    ema: float = Field(0.0, ge=0, lt=1)
    # Whether, after each merge, every merged site passes its training images once through the merged model, and what the
    # BatchNorm layers see there takes the place of the means and variances that came with the updates: those describe the
    # sites' own models. "auto": wherever nothing stands against it (no BatchNorm, layers that stay at the sites, a merge
    # rule other than the mean). Source: Wu & Johnson 2021, Rethinking "Batch" in BatchNorm, arXiv:2105.07576.
    recalibrate: bool | Literal["auto"] = False


class AdjustableOptions(StrategyOptions):
    """Options of strategies whose sites minimise a cross-entropy over their own images."""

    # How much the sites' loss makes up for their class frequencies, which stay there: logits get this many times
    # log(share of the class). 0 is plain cross-entropy, 1 balanced softmax (Ren et al. 2020, arXiv:2007.10740).
    logit_adjustment: float = Field(0.0, ge=0)


@dataclass(frozen=True, slots=True)
class SiteReport:
    """What a site says of its training, as far as merging needs it."""

    site: str
    num_examples: int
    num_steps: int = 0

    @classmethod
    def of(cls, site: str, report: Mapping[str, object]) -> Self:
        """Read a report as it travels.

        A count that is no number counts as zero, which the gate turns down.
        """
        counts = (report.get(key, 0) for key in ("num_examples", "num_steps"))
        num_examples, num_steps = (c if isinstance(c, int) and not isinstance(c, bool) else 0 for c in counts)
        return cls(site, num_examples, num_steps)


@dataclass(frozen=True, slots=True)
class SiteUpdate:
    """A site's trained tensors, in a canonical tensor file, with its report."""

    path: Path
    report: SiteReport
    # The part of its weight that counts: less than one for an update that came rounds late.
    share: float = 1.0
    # Whether the file holds whole tensors, however updates travel.
    whole: bool = False
    # The share of its length that is merged, by kind of tensors, where the gate shortened it.
    kept: Mapping[str, float] = field(default_factory=dict)

    @property
    def site(self) -> str:
        """Whose update this is."""
        return self.report.site


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """One round's merge. `updates` stand in site order: sums follow it, whatever the order of arrival."""

    round: int
    # The global model that the sites started from.
    model: Path
    updates: Sequence[SiteUpdate]
    # Tensors that stay at the sites: not in the updates, taken over from `model` unchanged.
    local_tensors: Collection[str]
    out: Path
    # What updates hold beside the model's tensors (`Strategy.update_extras`).
    extras: Sequence[TensorSpec] = ()
    # Names of the tensors that are trained, as opposed to buffers.
    parameters: Collection[str] = frozenset()
    # What the strategy kept in the round before (None: nothing yet), and where it writes what it keeps now.
    state: Path | None = None
    state_out: Path | None = None
    # Sites of the run; a round may ask fewer.
    num_sites: int = 0
    # How the updates travelled.
    transfer: TransferSection = field(default_factory=TransferSection)
    # How updates are merged; a strategy weighs them and steps from the merged model, whatever the rule.
    rule: AggregationSection = field(default_factory=MeanRule)


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What came of a merge: the new model's digest, the sites that are in it, and why the others are not.

    `state_digest` is that of the file at `request.state_out`; None if the strategy wrote none.
    """

    digest: str
    accepted: tuple[str, ...]
    rejected: Mapping[str, str] = field(default_factory=dict)
    state_digest: str | None = None
    figures: MergeFigures = field(default_factory=MergeFigures)


class Strategy(ABC):
    """A federated algorithm.

    Subclasses set `name`, `Options`, `objective` and override what differs from FedAvg.
    """

    name: ClassVar[str]
    Options: ClassVar[type[StrategyOptions]] = StrategyOptions
    # Whether sites get what the strategy keeps between rounds (`LocalContext.strategy_state`).
    shares_state: ClassVar[bool] = False
    # Whether its impressions are made once, after the first round, rather than as the plan's section says.
    synthesises_once: ClassVar[bool] = False

    def __init__(self, options: StrategyOptions) -> None:
        self.options = options

    @property
    @abstractmethod
    def objective(self) -> str:
        """Name of the objective (`fedagent.objectives`) that the sites train on."""

    @property
    def objective_options(self) -> PlanOptions:
        """Options of that objective."""
        return {}

    def check(self, plan: Plan) -> None:
        """Refuse a plan that this strategy can't work with. Raises PlanError."""
        return

    @property
    def synthesis(self) -> SynthesisOptions | None:
        """How impressions are made; None if this strategy makes none."""
        return None

    def local_tensors(self, names: Sequence[str], norm_names: Collection[str]) -> tuple[str, ...]:
        """Which of the model's tensors stay at the sites.

        `names` are all tensors of the model, `norm_names` those that belong to normalisation layers.
        """
        return ()

    def personal_tensors(self, names: Sequence[str], norm_names: Collection[str]) -> tuple[str, ...]:
        """Which of the model's tensors each site trains and evaluates in a version of its own, though they are sent
        and merged like all others: the coordinator's model is whole, and each site's is its own.

        Arguments as in `local_tensors`; no tensor is in both.
        """
        return ()

    def recalibrates(self, plan: Plan, against: str = "") -> bool:
        """Whether sites measure BatchNorm statistics anew after each merge; `against` says what in the model forbids it.

        Raises PlanError if the option asks for it where it can't be.
        """
        if plan.aggregation.rule != "mean":
            against = (
                f"aggregation.rule is '{plan.aggregation.rule}', which bounds what one site can do, and pooled statistics "
                "would not be bounded; expected 'mean'"
            )
        if against and self.options.recalibrate is True:
            raise PlanError(
                f"strategy_options.recalibrate: {against}",
                hint="leave the option out, or set it to 'auto': wherever nothing stands against it",
            )
        return self.options.recalibrate is not False and not against

    def statistics_to_measure(
        self, plan: Plan, statistics: Sequence[TensorSpec], local: Collection[str]
    ) -> list[TensorSpec]:
        """Which of the model's BatchNorm `statistics` sites measure after a merge: all, or none.

        `local` tensors stay at the sites. Raises PlanError, as `recalibrates`.
        """
        against = ""
        if not statistics:
            against = f"model '{plan.model.name}' has no BatchNorm layer with stored statistics"
        elif any(spec.name in local for spec in statistics):
            against = f"strategy '{self.name}' leaves the model's BatchNorm layers at the sites"
        elif any(spec.dtype != "F32" for spec in statistics):
            against = f"the statistics of model '{plan.model.name}' are not all float32"
        elif sum(spec.size_bytes for spec in statistics) > MAX_STATISTICS_BYTES:
            against = f"the statistics of model '{plan.model.name}' are above {MAX_STATISTICS_BYTES} bytes"
        return list(statistics) if self.recalibrates(plan, against) else []

    def update_extras(self, specs: Sequence[TensorSpec], parameters: Collection[str]) -> list[TensorSpec]:
        """What a site's update holds beside the model's tensors; every name begins with `EXTRA_PREFIX`.

        `specs` are the model's tensors, `parameters` the names of those that are trained. The objective's `end`
        makes them; the coordinator refuses an update without them, or with others.
        """
        return []

    def state_specs(self, specs: Sequence[TensorSpec], parameters: Collection[str]) -> list[TensorSpec]:
        """What it keeps at the coordinator between rounds: only to tell beforehand how many bytes that is.

        `specs` are the model's tensors, `parameters` the names of those that are trained.
        """
        return []

    def weights(self, reports: Sequence[SiteReport]) -> list[float]:
        """The share of each site in the merge, in the order given; they need not sum to one."""
        if self.options.weighting == "uniform":
            return [1.0] * len(reports)
        return [float(report.num_examples) for report in reports]

    def merge(self, request: MergeRequest) -> MergeResult:
        """Merge a round's updates, which have passed the gate, into a new model at `request.out`, by `request.rule`.

        Who overrides it calls `merge_updates` too, or refuses other rules than the mean in `check`. Raises
        EmptyRoundError if no update is usable.
        """
        from fedserver.aggregation import merge_updates

        return merge_updates(request, self.weights)
