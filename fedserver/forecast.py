"""A dry run of a plan: who would take part, what each site would move, how long a round would take. Pure.

Bytes follow from the plan and from the tensors' sizes; that they are what a run really moves is held by a test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedcore.plan import Plan
from fedcore.plan_forecast import PlanForecast, SiteForecast, Sizes
from fedcore.v1 import federation_pb2
from fedserver.measured_rates import Rates
from fedserver.plan_oddities import oddities
from fedserver.round_state import RunState
from fedserver.suitability import unable_reason
from fedserver.synthesis.schedule import should_synthesise


@dataclass(frozen=True, slots=True)
class Measure:
    """What the compute process found of a plan, and what its strategy does with it."""

    sizes: Sizes
    objective: str
    shares_state: bool
    synthesises: bool
    synthesises_once: bool
    overlaps: bool
    averages: bool
    recalibrates: bool = False

    def makes_in(self, plan: Plan, number: int) -> bool:
        """Whether round `number` makes impressions for the one after; the round machine's rule."""
        if not self.synthesises:
            return False
        if self.synthesises_once:
            return number == 1
        return should_synthesise(plan, number - 1 if self.overlaps else number)


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A site as the coordinator knows it. `withheld` says why an operator gives it no work, empty if it may work;
    `capabilities` is None while it is not connected.
    """

    id: str
    withheld: str
    capabilities: federation_pb2.Capabilities | None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the plan would meet: sites, free bytes, runs that come first, why nothing starts now (a drain)."""

    sites: Mapping[str, Enrolled]
    free_bytes: int
    # What the storage quota leaves beside all that can't be dropped; None without a quota.
    quota_room_bytes: int | None = None
    waits_for: Sequence[str] = ()
    held: str = ""
    # What else would be refused or is odd, from what only the coordinator can look at (files on its disk).
    refused: str = ""
    odd: Sequence[str] = ()
    heartbeat_interval_s: float = 5.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of a site: in a round that has everything, and in the whole run, at most."""

    up: int
    down: int
    total_up: int
    total_down: int


def traffic(plan: Plan, measure: Measure, num_sites: int) -> Traffic:
    """What a site moves.

    A site fetches the model that it starts from, unless it has it from the evaluation before; the merged one, where it
    measures statistics on it; the one that it evaluates; the impressions when there are new ones; and what the strategy
    shares.
    """
    sizes, rounds = measure.sizes, plan.rounds
    asked = plan.training.sites_per_round
    drawn = asked is not None and asked < num_sites
    # Drawn sites and averaged models: what was evaluated is not what the next round starts from.
    models = 2 if drawn or measure.averages else 1
    measured = 1 if measure.recalibrates else 0
    state = sizes.state if measure.shares_state else 0
    banks = sum(measure.makes_in(plan, number) for number in range(1, rounds))
    down = (models + measured) * sizes.model + (sizes.impressions if banks else 0) + state
    if not drawn:
        all_models = max(rounds + 1, 2 * rounds - 1) if measure.averages else rounds + 1
        total = (
            (all_models + measured * rounds) * sizes.model + banks * sizes.impressions + (rounds - 1) * state
        )
        return Traffic(sizes.update, down, rounds * sizes.update, total)
    assert asked is not None
    share = asked / num_sites
    turns = round(rounds * share)
    fetched = min(banks, turns) * sizes.impressions
    return Traffic(
        sizes.update,
        down,
        turns * sizes.update,
        turns * ((models + measured) * sizes.model + state) + fetched,
    )


def forecast(plan: Plan, measure: Measure, rates: Rates, around: Surroundings) -> PlanForecast:
    """Everything that can be said before a run is submitted."""
    expected = (
        plan.sites
        if plan.sites is not None
        else tuple(sorted(site.id for site in around.sites.values() if not site.withheld))
    )
    moved = traffic(plan, measure, len(expected))
    sites = [_site(name, plan, measure, moved, rates, around.sites.get(name)) for name in expected]
    coordinator_s = {
        name: seconds
        for name, seconds in rates.phases_s.items()
        if (measure.synthesises or name != "synthesising")
        and (measure.recalibrates or name != "recalibrating")
    }
    round_s, missing = _round_s(sites, coordinator_s, measure)
    kept, peak = _disk(plan, measure, len(expected))
    draft = PlanForecast(
        name=plan.name,
        strategy=plan.strategy,
        rounds=plan.rounds,
        min_sites=plan.min_sites,
        waits_for=list(around.waits_for),
        sites=sites,
        sizes=measure.sizes,
        coordinator_s=coordinator_s,
        round_s=round_s,
        run_s=None if round_s is None else round_s * plan.rounds,
        not_measured=missing,
        disk_kept_bytes=kept,
        disk_peak_bytes=peak,
        disk_free_bytes=around.free_bytes,
        quota_room_bytes=around.quota_room_bytes,
    )
    capabilities = [
        site.capabilities
        for name in expected
        if (site := around.sites.get(name)) and site.capabilities is not None
    ]
    quota = over_quota(plan, measure, len(expected), around.quota_room_bytes)
    odd = oddities(plan, measure.synthesises, draft, capabilities, around.heartbeat_interval_s)
    return draft.model_copy(update={"blocked": _blocked(draft, around, quota), "odd": [*odd, *around.odd]})


def _site(
    name: str, plan: Plan, measure: Measure, moved: Traffic, rates: Rates, site: Enrolled | None
) -> SiteForecast:
    capabilities = site.capabilities if site is not None else None
    why = _why_not(plan, measure, site) or rates.refusals.get(name, "")
    num_examples = capabilities.num_examples if capabilities is not None else None
    images_per_s, bytes_per_s = rates.images_per_s.get(name), rates.bytes_per_s.get(name)
    return SiteForecast(
        site=name,
        fits=not why,
        why=why,
        connected=capabilities is not None,
        num_examples=num_examples,
        bytes_up=moved.up,
        bytes_down=moved.down,
        total_bytes_up=moved.total_up,
        total_bytes_down=moved.total_down,
        images_per_s=images_per_s,
        bytes_per_s=bytes_per_s,
        training_s=None
        if images_per_s is None or num_examples is None
        else num_examples * plan.training.epochs / images_per_s,
        transfer_s=None if bytes_per_s is None else (moved.up + moved.down) / bytes_per_s,
    )


def _why_not(plan: Plan, measure: Measure, site: Enrolled | None) -> str:
    """Why a site would not take part, in words; empty if it would."""
    if site is None:
        return "not enrolled here"
    if site.withheld:
        return site.withheld
    if site.capabilities is None:
        return "not connected"
    return unable_reason(RunState(run=plan.name, plan=plan, objective=measure.objective), site.capabilities)


def _round_s(
    sites: Sequence[SiteForecast], coordinator_s: Mapping[str, float], measure: Measure
) -> tuple[float | None, list[str]]:
    """Seconds of a round, and what of it was never measured: the slowest site, then what the coordinator does."""
    fitting = [site for site in sites if site.fits]
    missing = [f"{site.site}: training of this model" for site in fitting if site.training_s is None]
    missing += [f"{site.site}: transfers of this size" for site in fitting if site.transfer_s is None]
    phases = ["aggregating", "evaluating", *(["synthesising"] if measure.synthesises else [])]
    phases += ["recalibrating"] if measure.recalibrates else []
    missing += [f"coordinator: {phase}" for phase in phases if phase not in coordinator_s]
    if missing or not fitting:
        return None, missing
    slowest = max((site.training_s or 0) + (site.transfer_s or 0) for site in fitting)
    beside = coordinator_s.get("synthesising", 0.0) if measure.synthesises else 0.0
    evaluating = coordinator_s["evaluating"]
    between = coordinator_s["aggregating"] + (coordinator_s["recalibrating"] if measure.recalibrates else 0.0)
    if measure.overlaps:
        slowest = max(slowest, beside)
    else:
        evaluating = max(evaluating, beside)
    return slowest + between + evaluating, []


def _disk(plan: Plan, measure: Measure, num_sites: int) -> tuple[int, int]:
    """Bytes at the coordinator: for good the models that the plan keeps and every round's impressions; a round's updates
    and what is being made beside them.
    """
    sizes = measure.sizes
    banks = sum(measure.makes_in(plan, number) for number in range(1, plan.rounds + 1))
    # The first model, those of the newest rounds, and the best.
    models = plan.rounds if plan.keep_models == "all" else min(plan.rounds, plan.keep_models + 1)
    kept = (models + 1) * sizes.model + banks * sizes.impressions
    asked = min(plan.training.sites_per_round or num_sites, num_sites)
    made = (3 if measure.averages else 1) + (1 if measure.recalibrates else 0)
    under_way = asked * sizes.update + made * sizes.model + 2 * sizes.state
    return kept, kept + under_way


def over_quota(plan: Plan, measure: Measure, num_sites: int, room_bytes: int | None) -> str:
    """Why a run of this plan is refused under the storage quota, which leaves it `room_bytes`; empty if it is not.

    Beside what `_disk` counts, updates of the round before may still be there: late ones.
    """
    asked = min(plan.training.sites_per_round or num_sites, num_sites)
    needs = _disk(plan, measure, num_sites)[1] + asked * measure.sizes.update
    if room_bytes is None or needs <= room_bytes:
        return ""
    return (
        f"it needs {_mib(needs)} of the coordinator's disk, expected at most {_mib(room_bytes)}: "
        "what else there is of the storage quota can't be freed"
    )


def _mib(num_bytes: int) -> str:
    return f"{max(num_bytes, 0) / (1 << 20):.1f} MiB"


def _blocked(draft: PlanForecast, around: Surroundings, quota: str) -> str:
    if around.refused:
        return around.refused
    if draft.fitting < draft.min_sites:
        return f"{draft.fitting} of {len(draft.sites)} sites fit, min_sites is {draft.min_sites}"
    if draft.disk_peak_bytes > draft.disk_free_bytes:
        return f"it needs {draft.disk_peak_bytes} bytes of disk at the coordinator, {draft.disk_free_bytes} are free"
    return quota or around.held
