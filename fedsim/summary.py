"""From the records of a run to one row of figures. No torch.

Figures without a suffix are those of the round that validation picked; `_last5` are means of the last five
rounds. All are read on held-out test images; validation alone picks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedcore.round_record import RoundRecord

LAST = 5
FINAL_SHARE = 0.9
Figure = Callable[[RoundRecord], float | None]


def worst_site(record: RoundRecord) -> float | None:
    """The lowest accuracy of a site."""
    return min((figures.accuracy for figures in record.sites.values()), default=None)


def worst_class(record: RoundRecord) -> float | None:
    """The lowest pooled recall of a class."""
    return min((record.classes or {}).values(), default=None)


FIGURES: Mapping[str, Figure] = {
    "accuracy": lambda record: record.accuracy,
    "balanced_accuracy": lambda record: record.balanced_accuracy,
    "worst_site_accuracy": worst_site,
    "worst_class_recall": worst_class,
}


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what is there; None if nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def figures_of(
    records: Sequence[RoundRecord], best_round: int | None, forgetting: Mapping[int, float | None]
) -> dict[str, Any]:
    """The figures of a run, by the names that table.json uses."""
    best = next((record for record in records if record.round == best_round), None)
    last = records[-LAST:]
    row: dict[str, Any] = {}
    for name, figure in FIGURES.items():
        row[name] = figure(best) if best is not None else None
        row[f"{name}_last5"] = mean([figure(record) for record in last])
    row["forgetting"] = mean([forgetting.get(record.round) for record in last])
    row["bytes_per_round"] = mean([float(r.bytes_up + r.bytes_down) for r in records])
    row["seconds_per_round"] = mean([r.seconds for r in records])
    row["best_round"] = best_round
    row["validation_accuracy"] = best.validation_accuracy if best is not None else None
    row["rounds_to_90_percent"] = rounds_to_share(records, row["balanced_accuracy_last5"])
    return row


def picked_of(
    records: Sequence[RoundRecord], best_round: int | None, forgetting: Mapping[int, float | None]
) -> dict[str, Any]:
    """What plots need beyond the row: accuracy of each site and recall of each class in the round that validation
    picked (`picked`, None without such a round), and each measured round's forgetting.
    """
    best = next((record for record in records if record.round == best_round), None)
    picked = None
    if best is not None:
        sites = {name: figures.accuracy for name, figures in best.sites.items()}
        picked = {"sites": sites, "classes": dict(best.classes or {})}
    return {"picked": picked, "forgetting": {str(number): value for number, value in forgetting.items()}}


def rounds_to_share(records: Sequence[RoundRecord], final: float | None) -> int | None:
    """The first round whose balanced accuracy is 90 % of the final value."""
    if final is None:
        return None
    reached = (
        record.round
        for record in records
        if record.balanced_accuracy is not None and record.balanced_accuracy >= FINAL_SHARE * final
    )
    return next(reached, None)


def curves_of(records: Sequence[RoundRecord]) -> dict[str, list[float | None]]:
    """Each figure round by round, for plots."""
    curves = {name: [figure(record) for record in records] for name, figure in FIGURES.items()}
    return {**curves, "validation_accuracy": [record.validation_accuracy for record in records]}
