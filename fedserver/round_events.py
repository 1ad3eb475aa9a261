"""What can happen to a run: facts, in the past tense, as the journal keeps them.

Every event carries `at`, seconds since the epoch by the coordinator's wall clock; it only ever becomes a figure in a
record, never a decision. Decisions that time makes arrive as events of their own (`SiteLetGo`, `CollectionClosed`).
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from fedcore.impression_check import ImpressionCheck
from fedcore.update_verdict import FoldedUpdate, MergeFigures, UpdateVerdict

# JSON has no NaN: one in the journal would come back as null, which no replay gets past. So it is refused at once.
_FACT = ConfigDict(frozen=True, allow_inf_nan=False)


class Metrics(BaseModel):
    """Figures of one held-out split at one site; per-class counts only if the site shares them."""

    model_config = _FACT

    split: str
    num_examples: int
    num_correct: int
    loss_sum: float
    class_totals: tuple[int, ...] = ()
    class_correct: tuple[int, ...] = ()


class Report(BaseModel):
    """What a site said of the training behind its update."""

    model_config = _FACT

    num_examples: int
    num_steps: int = 0
    train_loss: float = 0.0
    num_impressions: int = 0
    seconds: float = 0.0
    threads: int = 0
    device: str = ""
    corrupt_images: int = 0
    # What the site's check of the impressions found; None if none came, or the site checks none.
    impression_check: ImpressionCheck | None = None


class _Event(BaseModel):
    model_config = ConfigDict(**_FACT, extra="forbid")

    at: float


class RunStarted(_Event):
    """The run left the queue; `sites` are the expected ones."""

    kind: Literal["run_started"] = "run_started"
    sites: tuple[str, ...]
    synthesises: bool


class RunInitialised(_Event):
    """The first global model is stored, and what an update must look like is known."""

    kind: Literal["run_initialised"] = "run_initialised"
    model: str
    update_tensors: tuple[tuple[str, str, tuple[int, ...]], ...]
    local_tensors: tuple[str, ...]
    # Those of which a site has its own version, and sends it.
    personal_tensors: tuple[str, ...] = ()
    objective: str
    objective_options_json: str
    # Whether sites get what the strategy keeps between rounds.
    shares_state: bool = False
    # Whether the first impressions serve the whole run; whether they are made while sites train, through the model that
    # these start from, for the round after.
    synthesises_once: bool = False
    overlaps: bool = False
    # The BatchNorm statistics that sites measure anew after each merge; none in a run that leaves them as merged.
    statistic_tensors: tuple[tuple[str, str, tuple[int, ...]], ...] = ()


class RoundOpened(_Event):
    """A round, or its repetition, began. `expected` are this round's sites, `registered` those that are here and able."""

    kind: Literal["round_opened"] = "round_opened"
    round: int
    attempt: int
    expected: tuple[str, ...]
    registered: tuple[str, ...]
    reason: str
    # Why each expected site that is not registered is not.
    absent: dict[str, str] = {}
    # Training images that each registered site has said it has; sites that said nothing are not in it.
    registered_examples: dict[str, int] = {}


class TaskStarted(_Event):
    """A site acknowledged its training task."""

    kind: Literal["task_started"] = "task_started"
    round: int
    site: str


class UpdateStored(_Event):
    """A site's update is durable and verified."""

    kind: Literal["update_stored"] = "update_stored"
    round: int
    site: str
    digest: str
    payload_bytes: int
    report: Report


class SiteLetGo(_Event):
    """The round goes on without a site: it failed, stalled, was lost, or the deadline passed.

    `slow` sites did not fail: their update may still come.
    """

    kind: Literal["site_let_go"] = "site_let_go"
    round: int
    site: str
    reason: str
    slow: bool = False


class CollectionClosed(_Event):
    """No further update is taken in this attempt."""

    kind: Literal["collection_closed"] = "collection_closed"
    round: int
    reason: str


class AggregationFinished(_Event):
    """The new global model is stored. `rejected` updates did not pass the gate.

    `model` is what the next round starts from; `released`, its average over rounds, is what is evaluated and handed out
    (None: `model` itself). `strategy_state` is what the strategy keeps for the next round (None: as before).
    """

    kind: Literal["aggregation_finished"] = "aggregation_finished"
    round: int
    model: str
    accepted: tuple[str, ...]
    rejected: dict[str, str]
    released: str | None = None
    strategy_state: str | None = None
    verdicts: dict[str, UpdateVerdict] = {}
    merge: MergeFigures | None = None
    # Late updates of earlier rounds that this aggregation used up, those that the gate refused included.
    folded: dict[str, FoldedUpdate] = {}


class AggregationFailed(_Event):
    """Too few updates could be used, or none could be merged. `rejected` says why, a site."""

    kind: Literal["aggregation_failed"] = "aggregation_failed"
    round: int
    reason: str
    rejected: dict[str, str]
    verdicts: dict[str, UpdateVerdict] = {}


class StatisticsStored(_Event):
    """What the merged model's BatchNorm layers see of a site's training images is measured, checked and durable."""

    kind: Literal["statistics_stored"] = "statistics_stored"
    round: int
    site: str
    digest: str
    num_examples: int


class StatisticsLetGo(_Event):
    """The statistics are pooled without a site."""

    kind: Literal["statistics_let_go"] = "statistics_let_go"
    round: int
    site: str
    reason: str


class StatisticsLost(_Event):
    """Stored statistics are gone or damaged on the coordinator's disk, with the reason by site: these are asked again."""

    kind: Literal["statistics_lost"] = "statistics_lost"
    round: int
    lost: dict[str, str]


class ModelRecalibrated(_Event):
    """The model that is handed out is stored with the sites' pooled statistics, as `model`.

    `rejected` statistics did not pass the gate, with the reason by site.
    """

    kind: Literal["model_recalibrated"] = "model_recalibrated"
    round: int
    model: str
    rejected: dict[str, str] = {}


class RecalibrationSkipped(_Event):
    """The statistics stay as they were merged: too few sites measured theirs, or they could not be pooled."""

    kind: Literal["recalibration_skipped"] = "recalibration_skipped"
    round: int
    reason: str


class SynthesisFinished(_Event):
    """The round's impressions are stored; or there are none, and `note` says why."""

    kind: Literal["synthesis_finished"] = "synthesis_finished"
    round: int
    impressions: str | None
    made: int
    note: str = ""
    # How they came about, in counts and shares.
    figures: dict[str, float] = {}
    # The bank that they were begun from, None for none (or an earlier version's event).
    previous: str | None = None


class EvaluationReported(_Event):
    """A site (or, under the name "", the coordinator's own set) measured the new global model."""

    kind: Literal["evaluation_reported"] = "evaluation_reported"
    round: int
    site: str
    metrics: tuple[Metrics, ...]


class UpdatesScored(_Event):
    """What local training did to each class was measured on the coordinator's own images; or not, and `note` says why.

    All counts are a class: of images, and of those that were recognised by the model that sites started from (`before`)
    and by each site's update (`after`). Sites whose update could not be scored are not in `after`.
    """

    kind: Literal["updates_scored"] = "updates_scored"
    round: int
    class_totals: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    after: dict[str, tuple[int, ...]] = {}
    note: str = ""


class EvaluationLetGo(_Event):
    """The round's figures are made without a site."""

    kind: Literal["evaluation_let_go"] = "evaluation_let_go"
    round: int
    site: str
    reason: str


class RoundFinished(_Event):
    """The round is over; `record_json` is its line of rounds.jsonl."""

    kind: Literal["round_finished"] = "round_finished"
    round: int
    record_json: str


class PauseRequested(_Event):
    """An operator wants no further round to open."""

    kind: Literal["pause_requested"] = "pause_requested"
    by: str


class ResumeRequested(_Event):
    """An operator wants the run to go on."""

    kind: Literal["resume_requested"] = "resume_requested"
    by: str


class ImpressionsPurged(_Event):
    """An operator had these rounds' banks removed; also of a run that is over. `sites` are asked to remove theirs."""

    kind: Literal["impressions_purged"] = "impressions_purged"
    purge: str
    rounds: tuple[int, ...]
    digests: tuple[str, ...]
    sites: tuple[str, ...]
    by: str
    reason: str


class PurgeConfirmed(_Event):
    """A site has removed a purge's banks; `deleted` are those that it had. `audit_head` is its log's, SEQUENCE:DIGEST."""

    kind: Literal["purge_confirmed"] = "purge_confirmed"
    purge: str
    site: str
    deleted: tuple[str, ...]
    audit_head: str


class ModelsDropped(_Event):
    """The models of these finished rounds were given up to save disk; also of a run that is over."""

    kind: Literal["models_dropped"] = "models_dropped"
    rounds: tuple[int, ...]
    reason: str


class RunFinished(_Event):
    """The run is over, for good."""

    kind: Literal["run_finished"] = "run_finished"
    status: Literal["DONE", "DEGRADED", "FAILED", "ABORTED"]
    reason: str


Event = Annotated[
    RunStarted
    | RunInitialised
    | RoundOpened
    | TaskStarted
    | UpdateStored
    | SiteLetGo
    | CollectionClosed
    | AggregationFinished
    | AggregationFailed
    | StatisticsStored
    | StatisticsLetGo
    | StatisticsLost
    | ModelRecalibrated
    | RecalibrationSkipped
    | SynthesisFinished
    | EvaluationReported
    | EvaluationLetGo
    | UpdatesScored
    | RoundFinished
    | PauseRequested
    | ResumeRequested
    | ImpressionsPurged
    | PurgeConfirmed
    | ModelsDropped
    | RunFinished,
    Field(discriminator="kind"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event)
