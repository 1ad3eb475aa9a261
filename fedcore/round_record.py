"""What is known of a finished round: a line of rounds.jsonl, and what `fedctl run rounds` shows."""

from pydantic import BaseModel, ConfigDict

from fedcore.impression_check import ImpressionCheck
from fedcore.update_verdict import FoldedUpdate, MergeFigures, UpdateVerdict


class SiteFigures(BaseModel):
    """Held-out accuracy of the round's global model at one site, and the size of that set."""

    model_config = ConfigDict(frozen=True)

    accuracy: float
    num_examples: int


class ImpressionFigures(BaseModel):
    """Impressions made after this round's aggregation, and how many each site had trained on in it."""

    model_config = ConfigDict(frozen=True)

    made: int = 0
    used: dict[str, int] = {}
    # Why none were made, when the plan would have had some.
    note: str = ""
    # How they came about: counts of images kept, made anew and rejected, and steps.
    figures: dict[str, float] = {}
    # What sites found when they compared those that they got in this round with their own images.
    checks: dict[str, ImpressionCheck] = {}


class UpdateScores(BaseModel):
    """What local training did in this round, measured on the coordinator's own images, by class name.

    Recalls are of the model that the sites started from (`before`) and of each site's update as it left the site
    (`after`). The coordinator does not know which classes a site has; so a site's forgetting is the mean, over all
    classes of which there are images, of what it lost: max(0, before - after). A class that it gained makes up for none.
    """

    model_config = ConfigDict(frozen=True)

    # Images of each class; the recall of a class with few is coarse.
    num_examples: dict[str, int] = {}
    before: dict[str, float] = {}
    after: dict[str, dict[str, float]] = {}
    forgetting: dict[str, float] = {}
    # Mean over the sites; null if none was scored.
    mean_forgetting: float | None = None
    # At most three classes that a site lost most, the worst first.
    most_lost: dict[str, list[str]] = {}
    # Why sites, or all, are not scored.
    note: str = ""


class RecalibrationFigures(BaseModel):
    """BatchNorm statistics measured after the round's merge: training images that each site measured on."""

    model_config = ConfigDict(frozen=True)

    num_examples: dict[str, int] = {}
    # Sites whose statistics are not in the model, with the reason.
    left_out: dict[str, str] = {}
    # Why the model kept the statistics that it was merged with; empty if it did not.
    note: str = ""


class RoundRecord(BaseModel):
    """One finished round. Counts are of sites; accuracies are shares in [0, 1]; `*_s` are seconds."""

    model_config = ConfigDict(frozen=True)

    round: int
    # The five counts: of the plan's sites, those connected and able when the round opened, those that
    # acknowledged, those whose update became durable, those whose update passed the gate.
    expected: int
    registered: int
    started: int
    reported: int
    aggregated: int
    accuracy: float | None
    balanced_accuracy: float | None
    # Why balanced_accuracy is null, when it is.
    balanced_accuracy_note: str = ""
    # Pooled accuracy on the sites' validation images: picks the best round.
    validation_accuracy: float | None = None
    loss: float | None = None
    sites: dict[str, SiteFigures] = {}
    # Pooled recall a class, by class name; null without per-class counts.
    classes: dict[str, float] | None = None
    impressions: ImpressionFigures = ImpressionFigures()
    # Null unless the plan has evaluation.updates_data.
    update_scores: UpdateScores | None = None
    # Null unless the run measures BatchNorm statistics anew after each merge.
    recalibration: RecalibrationFigures | None = None
    phases_s: dict[str, float] = {}
    seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    # Sites expected but not aggregated, with the reason.
    missing: dict[str, str] = {}
    attempts: int = 1
    # What the gate found of each update, and how those that passed were merged; null in rounds of earlier versions.
    gate: dict[str, UpdateVerdict] = {}
    merge: MergeFigures | None = None
    # Updates of earlier rounds that came late and were dealt with in this one, by site.
    folded: dict[str, FoldedUpdate] = {}
    # Digests, for the record.
    model: str = ""
    impressions_digest: str = ""
    # What each site said of its training: seconds, loss, steps, device, threads.
    training: dict[str, dict[str, float | int | str]] = {}
