"""The plan of a run: what to train, on what terms. One schema for coordinator, sites and simulator.

A plan is written in TOML by the operator, validated here, and travels as JSON. An unknown key is an
error, so that a misspelt option never trains something else in silence.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from fedcore.errors import PlanError
from fedcore.parsing import parse_toml
from fedcore.plan_robustness import (
    AggregationSection,
    GateSection,
    MeanRule,
    MultiKrumRule,
    NormClipRule,
    TrimmedMeanRule,
)

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")]
Scalar = bool | int | float | str
Options = dict[str, Scalar | list[Scalar]]
PositiveFloat = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class ModelSection(_Section):
    """Which architecture. `input` is (channels, height, width) after the transform."""

    name: str
    classes: int = Field(ge=2, le=10_000)
    input: tuple[
        Annotated[int, Field(ge=1, le=16)],
        Annotated[int, Field(ge=1, le=4096)],
        Annotated[int, Field(ge=1, le=4096)],
    ]
    norm: Literal["batch", "group"] = "batch"
    options: Options = {}


class TrainingSection(_Section):
    """What a site does in a round. `precision`: "auto" is fp32 on a CPU and bf16 on a GPU; fp16 takes effect on a
    GPU only."""

    epochs: int = Field(1, ge=1, le=1000)
    batch_size: int = Field(64, ge=1, le=65536)
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: PositiveFloat = 0.02
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    # Over the rounds of the run; a round's rate is constant.
    schedule: Literal["constant", "cosine"] = "constant"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # End the run after this many rounds without a better validation accuracy.
    early_stop: int | None = Field(None, ge=1)
    # Ask only so many sites a round, drawn by the plan's seed.
    sites_per_round: int | None = Field(None, ge=1)
    # Start from this run's best model, or from a safetensors file of the operator's.
    initial: str | None = None


class SynthesisSection(_Section):
    """When impressions are made and how many. How they are made are options of the strategy."""

    # Rounds that end before the first impressions are made. "auto": from round 2 on, as soon as the global model is good
    # enough to be worth remembering.
    warmup_rounds: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    every_rounds: int = Field(1, ge=1)
    images: int = Field(64, ge=1, le=100_000)


class LimitsSection(_Section):
    """The three times of a round, in seconds; what becomes of updates that come late, and of sites that fail."""

    round_deadline_s: PositiveFloat = 3600
    stall_timeout_s: PositiveFloat = 60
    join_wait_s: Annotated[float, Field(ge=0)] = 10
    # An update that comes after its round closed is dropped; or folded into the next aggregation, where it counts
    # `late_weight` to the power of the rounds that it is late. It is waited for, and its site asked for nothing else, for
    # at most `late_rounds` rounds after its own.
    late_updates: Literal["drop", "fold"] = "drop"
    late_weight: float = Field(0.5, gt=0, le=1)
    late_rounds: int = Field(3, ge=1)
    # A site that fails so many rounds in a row is not asked in the next `park_rounds`; 0 parks none.
    park_after: int = Field(3, ge=0)
    park_rounds: int = Field(3, ge=1)


# Limits that agents of version 0.1 do not know; sites need none of them.
_COORDINATORS_LIMITS = {"late_updates", "late_weight", "late_rounds", "park_after", "park_rounds"}


class TransferSection(_Section):
    """How updates travel from the sites. Anything but "lossless" is a coding of `fedcore.update_coding`."""

    # "bf16" halves an update, "int8" quarters it, "top_k" sends so large a share of each kernel's numbers only.
    updates: Literal["lossless", "bf16", "int8", "top_k"] = "lossless"
    top_k_share: float = Field(0.1, gt=0, le=1)


class DataSection(_Section):
    """How labels are named, and how much broken data a site may skip."""

    class_names: tuple[str, ...] | None = None
    # Share of a site's images that may be unreadable before the site reports itself failed.
    max_corrupt_fraction: float = Field(0.01, ge=0, le=1)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if self.class_names is not None and len(set(self.class_names)) != len(self.class_names):
            raise ValueError("class_names holds a name twice")
        return self


class TransformSection(_Section):
    """From an image as stored to the model's input; sites and coordinator share it.

    Images are converted to `channels`, resized to `size` (height, width), scaled to [0, 1] and normalised
    by `mean` and `std` (one number a channel). Unset values follow from the model's input.
    """

    size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    channels: Literal[1, 3] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[PositiveFloat, ...] | None = None
    augment: tuple[Literal["hflip", "vflip", "rot90", "shift"], ...] = ()


class EvaluationSection(_Section):
    """Images of the coordinator's own, which no site gave: npz files with MedMNIST's keys on the coordinator's disk."""

    # Every round's model is scored on this file's test images; the round's accuracy and recalls are theirs then.
    data: str | None = None
    # What local training does to each class: the model that sites start from and every site's update are scored on this
    # file's validation images, or on its test images if it has no others. No other figure of a round comes from it.
    updates_data: str | None = None
    # At most so many of them, as even over the classes as they allow, drawn by the plan's seed.
    updates_images: int = Field(400, ge=1, le=100_000)


class Plan(_Section):
    """A run as the operator asks for it."""

    name: Name
    rounds: int = Field(ge=1, le=100_000)
    # Of how many rounds, the newest, the coordinator keeps the model; the best round's is kept beside them.
    keep_models: Literal["all"] | Annotated[int, Field(ge=1)] = "all"
    min_sites: int = Field(1, ge=1)
    strategy: str = "fedimpres"
    strategy_options: Options = {}
    sites: tuple[Name, ...] | None = None
    seed: int = Field(0, ge=0, lt=2**31)
    model: ModelSection
    training: TrainingSection = TrainingSection()
    synthesis: SynthesisSection = SynthesisSection()
    limits: LimitsSection = LimitsSection()
    transfer: TransferSection = TransferSection()
    data: DataSection = DataSection()
    transform: TransformSection = TransformSection()
    evaluation: EvaluationSection = EvaluationSection()
    gate: GateSection = GateSection()
    aggregation: AggregationSection = MeanRule()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        channels, height, width = self.model.input
        if self.data.class_names is not None and len(self.data.class_names) != self.model.classes:
            raise ValueError(
                f"data.class_names has {len(self.data.class_names)} names, model.classes is {self.model.classes}"
            )
        if self.transform.size is not None and self.transform.size != (height, width):
            raise ValueError(
                f"transform.size is {list(self.transform.size)}, model.input says {[height, width]}"
            )
        if self.transform.channels is not None and self.transform.channels != channels:
            raise ValueError(f"transform.channels is {self.transform.channels}, model.input says {channels}")
        for key in ("mean", "std"):
            values = getattr(self.transform, key)
            if values is not None and len(values) != channels:
                raise ValueError(
                    f"transform.{key} has {len(values)} numbers, model.input has {channels} channels"
                )
        if self.sites is not None:
            if len(set(self.sites)) != len(self.sites):
                raise ValueError("sites names a site twice")
            if len(self.sites) < self.min_sites:
                raise ValueError(f"min_sites is {self.min_sites}, but sites names only {len(self.sites)}")
        per_round = self.training.sites_per_round
        if per_round is not None and per_round < self.min_sites:
            raise ValueError(f"training.sites_per_round is {per_round}, below min_sites = {self.min_sites}")
        self._check_aggregation()
        return self

    def _check_aggregation(self) -> None:
        """Raise ValueError for an aggregation rule that does not go with the rest of the plan."""
        rule = self.aggregation
        most = min(
            len(self.sites) if self.sites is not None else 1 << 30, self.training.sites_per_round or 1 << 30
        )
        if isinstance(rule, TrimmedMeanRule | MultiKrumRule) and most < rule.least_sites:
            raise ValueError(
                f"aggregation: {rule.rule} with tolerate = {rule.tolerate} needs {rule.least_sites} sites a round, "
                f"there are {most}"
            )
        if self.limits.late_updates == "fold" and not isinstance(rule, MeanRule | NormClipRule):
            raise ValueError(
                f"limits.late_updates is 'fold', which goes with the aggregation rules mean and norm_clip: "
                f"{rule.rule} compares the updates of one round"
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the model's outputs; the numbers if the plan has none."""
        return self.data.class_names or tuple(str(k) for k in range(self.model.classes))

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean that the transform subtracts, one number a channel, images scaled to [0, 1]."""
        return self.transform.mean or (0.5,) * self.model.input[0]

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation that the transform divides by, one number a channel."""
        return self.transform.std or (0.5,) * self.model.input[0]

    def to_json(self) -> str:
        """The plan as it travels and as it is journalled: less what is at its default and version 0.1 would not know."""
        unknown = {"keep_models"} if self.keep_models == "all" else None
        return self.model_dump_json(exclude_none=True, exclude=unknown)

    def to_site_json(self) -> str:
        """The plan as sites get it: less what only the coordinator acts upon, and what else is at its
        default and an agent of version 0.1 would not know."""
        unknown: dict[str, bool | set[str]] = {
            "keep_models": True, "gate": True, "aggregation": True, "limits": _COORDINATORS_LIMITS,
        }  # fmt: skip
        if self.transfer == TransferSection():
            unknown["transfer"] = True
        return self.model_dump_json(exclude_none=True, exclude=unknown)


def parse_plan(text: str, source: str = "plan") -> Plan:
    """Validate a plan written in TOML. Raises PlanError that names the keys."""
    try:
        document = parse_toml(text)
    except ValueError as error:
        raise PlanError(f"{source}: not valid TOML: {error}") from error
    return validate_plan(document, source)


def validate_plan(document: dict[str, Any], source: str = "plan") -> Plan:
    """Validate a plan given as a mapping. Raises PlanError that names the keys."""
    try:
        return Plan.model_validate(document)
    except ValidationError as error:
        raise PlanError(f"{source}: {describe_problems(error)}") from error


def plan_from_json(text: str, source: str = "plan") -> Plan:
    """Validate a plan as it travels. Raises PlanError."""
    try:
        return Plan.model_validate_json(text)
    except ValidationError as error:
        raise PlanError(f"{source}: {describe_problems(error)}") from error


def load_plan(path: Path) -> Plan:
    """Read a plan from a TOML file. Raises PlanError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: can't be read: {error}") from error
    return parse_plan(text, str(path))


def describe_problems(error: ValidationError) -> str:
    """Say what pydantic found in one line: key, what is wrong, what was given."""
    return "; ".join(_describe(dict(problem)) for problem in error.errors())


def _describe(problem: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{where}'"
    if problem["type"] == "missing":
        return f"key '{where}' is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not where:
        return message
    return f"'{where}': {message[:1].lower()}{message[1:]} (got {problem['input']!r:.80})"
