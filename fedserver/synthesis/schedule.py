"""When impressions are made. Pure and without torch: the round machine asks here."""

from fedcore.plan import Plan

# With "auto" it is the model's validated accuracy that says when there is something to remember (`readiness.py`).
AUTO_WARMUP_ROUNDS = 1


def should_synthesise(plan: Plan, round_number: int) -> bool:
    """Whether the plan wants impressions from the model that round `round_number` (from 1) ends with.

    Holds for strategies that make impressions (`fedserver.strategies.makes_impressions`). The first are made
    when the warm-up has ended, so that the sites of the following round have them; then every `every_rounds`
    rounds, the last included: its impressions belong to the model that the run ends with.
    """
    warmup = plan.synthesis.warmup_rounds
    first = AUTO_WARMUP_ROUNDS if warmup == "auto" else max(1, warmup)
    return round_number >= first and (round_number - first) % plan.synthesis.every_rounds == 0
