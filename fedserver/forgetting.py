"""From counts of recognised images to what local training made each site forget. Pure.

Forgetting is the mean, over the classes of which the coordinator has images, of max(0, recall before - recall after).
It differs from what `fedsim` measures, the drop in the classes that a site hardly has: a coordinator does not know which
these are, and does not ask. On few images part of it is chance: a class whose recall only wavers counts where it falls.
"""

from fedcore.round_record import UpdateScores
from fedserver.round_events import UpdatesScored

MOST_LOST = 3


def update_scores(scored: UpdatesScored, class_names: tuple[str, ...]) -> UpdateScores:
    """Recalls, forgetting and the classes most lost, by class name; classes without images are left out."""
    occurring = [k for k, total in enumerate(scored.class_totals) if total > 0]
    if not occurring:
        return UpdateScores(note=scored.note)

    def recalls(correct: tuple[int, ...]) -> dict[str, float]:
        return {class_names[k]: correct[k] / scored.class_totals[k] for k in occurring}

    before = recalls(scored.before)
    after = {site: recalls(correct) for site, correct in sorted(scored.after.items())}
    lost = {site: _lost(before, recall) for site, recall in after.items()}
    forgetting = {site: sum(drops.values()) / len(occurring) for site, drops in lost.items()}
    return UpdateScores(
        num_examples={class_names[k]: scored.class_totals[k] for k in occurring},
        before=before,
        after=after,
        forgetting=forgetting,
        mean_forgetting=sum(forgetting.values()) / len(forgetting) if forgetting else None,
        most_lost={site: _worst(drops) for site, drops in lost.items()},
        note=scored.note,
    )


def _lost(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: max(0.0, recall - after[name]) for name, recall in before.items()}


def _worst(drops: dict[str, float]) -> list[str]:
    """The classes with the largest drops; of equal ones the earlier."""
    falling = [name for name, drop in drops.items() if drop > 0]
    return sorted(falling, key=lambda name: -drops[name])[:MOST_LOST]
