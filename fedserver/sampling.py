"""Which of the plan's sites a round asks."""

import random

from fedcore.plan import Plan
from fedcore.seeding import derive_seed


def sites_of_round(plan: Plan, sites: tuple[str, ...], number: int) -> tuple[str, ...]:
    """The sites of round `number`, sorted: all, or `training.sites_per_round` drawn by the plan's seed."""
    count = plan.training.sites_per_round
    if count is None or count >= len(sites):
        return tuple(sorted(sites))
    draw = random.Random(derive_seed(plan.seed, "sites_per_round", number))  # noqa: S311 - not for secrets
    return tuple(sorted(draw.sample(sorted(sites), count)))
