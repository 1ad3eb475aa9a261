"""What in a plan is allowed but looks unintended, one line each. Pure."""

from collections.abc import Iterator, Sequence

from fedcore.plan import Plan
from fedcore.plan_forecast import PlanForecast
from fedcore.v1 import federation_pb2


def oddities(
    plan: Plan,
    synthesises: bool,
    draft: PlanForecast,
    capabilities: Sequence[federation_pb2.Capabilities],
    heartbeat_interval_s: float,
) -> list[str]:
    """All of them, each with what follows from it. `capabilities` are those of the expected sites that are there."""
    return [
        *_about_sites(plan, len(draft.sites), capabilities),
        *_about_training(plan, draft, capabilities),
        *_about_impressions(plan, synthesises),
        *_about_times(plan, draft, heartbeat_interval_s),
    ]


def _about_sites(
    plan: Plan, expected: int, capabilities: Sequence[federation_pb2.Capabilities]
) -> Iterator[str]:
    if plan.min_sites == 1 and expected > 1:
        yield "min_sites = 1: a round with one site's update alone counts, and its model is that site's"
    per_round = plan.training.sites_per_round
    if per_round is not None and per_round >= expected:
        yield f"training.sites_per_round = {per_round} has no effect: there are {expected} sites"
    versions = sorted({said.software_version for said in capabilities if said.software_version})
    if len(versions) > 1:
        yield f"sites run different versions: {', '.join(versions)}"
    known = {name for said in capabilities for name in said.class_names}
    if known and plan.data.class_names is not None:
        nobody = [name for name in plan.class_names if name not in known]
        if nobody:
            yield f"no connected site has class {', '.join(nobody)}: the model can't learn it"
    if known and plan.data.class_names is None and len(known) > plan.model.classes:
        yield f"sites name {len(known)} classes, model.classes is {plan.model.classes}, and the plan names none"


def _about_training(
    plan: Plan, draft: PlanForecast, capabilities: Sequence[federation_pb2.Capabilities]
) -> Iterator[str]:
    training = plan.training
    small = [
        site.site
        for site in draft.sites
        if site.num_examples is not None and 0 < site.num_examples < training.batch_size
    ]
    if small:
        yield f"training.batch_size = {training.batch_size} is more than all images of {', '.join(small)}"
    limit = 1.0 if training.optimizer == "sgd" else 0.03
    if training.learning_rate > limit:
        yield f"training.learning_rate = {training.learning_rate:g} is high for {training.optimizer}"
    if training.optimizer != "sgd" and "momentum" in training.model_fields_set:
        yield f"training.momentum has no effect with {training.optimizer}"
    if training.early_stop is not None and training.early_stop >= plan.rounds:
        yield f"training.early_stop = {training.early_stop} has no effect in {plan.rounds} rounds"
    if any(said.num_examples == 0 for said in capabilities):
        yield "a connected site has no training images"


def _about_impressions(plan: Plan, synthesises: bool) -> Iterator[str]:
    section = plan.synthesis
    if not synthesises:
        if "synthesis" in plan.model_fields_set:
            yield f"[synthesis] has no effect: strategy '{plan.strategy}' makes no impressions"
        return
    warmup = 1 if section.warmup_rounds == "auto" else section.warmup_rounds
    if warmup >= plan.rounds:
        yield f"synthesis.warmup_rounds = {section.warmup_rounds}: no site will ever see an impression"
    if section.images < plan.model.classes:
        yield f"synthesis.images = {section.images} is fewer than one a class ({plan.model.classes})"


def _about_times(plan: Plan, draft: PlanForecast, heartbeat_interval_s: float) -> Iterator[str]:
    limits = plan.limits
    if limits.stall_timeout_s >= limits.round_deadline_s:
        yield (
            f"limits.stall_timeout_s = {limits.stall_timeout_s:g} is no less than round_deadline_s = "
            f"{limits.round_deadline_s:g}: a site that hangs costs the whole deadline"
        )
    if limits.stall_timeout_s < 2 * heartbeat_interval_s:
        yield (
            f"limits.stall_timeout_s = {limits.stall_timeout_s:g} is below two heartbeats of the sites "
            f"({heartbeat_interval_s:g} s each): a short break lets a site go"
        )
    if limits.join_wait_s >= limits.round_deadline_s:
        yield f"limits.join_wait_s = {limits.join_wait_s:g} is no less than round_deadline_s"
    slow = [
        site.site
        for site in draft.sites
        if (site.training_s or 0) + (site.transfer_s or 0) > limits.round_deadline_s
    ]
    if slow:
        yield f"limits.round_deadline_s = {limits.round_deadline_s:g} is too short for {', '.join(slow)}, as measured"
