"""Brings together what a dry run of a plan needs: sizes, earlier runs, sites, disk. Changes nothing."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from fedcore.artifact_store import ArtifactStore
from fedcore.errors import ComputeError, FedimpresError, OverloadedError, QuotaError
from fedcore.plan import Plan
from fedcore.plan_forecast import PlanForecast
from fedserver.compute_work import ComputeWork
from fedserver.forecast import Enrolled, Surroundings, forecast, over_quota
from fedserver.journal import Journal
from fedserver.measured_rates import KINDS, NEWEST, Past, measured
from fedserver.model_keeper import Usage
from fedserver.registry import Registry
from fedserver.roster import Roster
from fedserver.round_driver import RoundDriver
from fedserver.strategies import load_strategy

# Earlier runs that are looked at, the newest, and events of each.
_RUNS = 20
_EVENTS = 5000
log = structlog.get_logger(__name__)


class DryRun:
    """Answers what a plan would meet here. `heartbeat_interval_s` is that of the sites."""

    def __init__(
        self,
        driver: RoundDriver,
        roster: Roster,
        registry: Registry,
        journal: Journal,
        work: ComputeWork,
        store: ArtifactStore,
        usage: Callable[[], Awaitable[Usage]],
        heartbeat_interval_s: float,
    ) -> None:
        self._driver = driver
        self._roster = roster
        self._registry = registry
        self._journal = journal
        self._work = work
        self._store = store
        self._usage = usage
        self._heartbeat_interval_s = heartbeat_interval_s

    async def check(self, plan: Plan) -> PlanForecast:
        """The forecast of a plan.

        Raises PlanError for what a submission would refuse of the plan itself, and as `ComputeWork.measure`.
        """
        load_strategy(plan)
        measure = await self._work.measure(plan)
        past = await asyncio.to_thread(self._past)
        rates = measured(plan, past, measure.sizes.update + measure.sizes.impressions)
        return forecast(plan, measure, rates, self._around(plan, (await self._usage()).room_bytes))

    async def check_quota(self, plan: Plan) -> None:
        """Raise QuotaError if a run of this plan does not fit into the storage quota, PlanError if it can't be built.

        It is let in unmeasured while the compute process is busy: a queue of runs must not wait for that.
        """
        room_bytes = (await self._usage()).room_bytes
        if room_bytes is None:
            return
        try:
            measure = await self._work.measure(plan)
        except (OverloadedError, ComputeError) as error:
            log.warning("plan let in without a look at the storage quota", plan=plan.name, error=str(error))
            return
        sites = plan.sites if plan.sites is not None else self._registry.enabled_sites()
        why = over_quota(plan, measure, len(sites), room_bytes)
        if why:
            raise QuotaError(
                f"plan {plan.name}: {why}",
                hint="keep fewer models (keep_models in the plan), purge impressions, or raise [storage] quota_gib in "
                "fedserver.toml",
            )

    def _past(self) -> list[Past]:
        views = self._driver.views()[-_RUNS:]
        return [
            Past(
                view.state.run,
                view.state.plan,
                tuple(finished.record() for finished in view.state.records[-NEWEST:]),
                self._journal.newest(view.state.run, KINDS, _EVENTS),
            )
            for view in views
        ]

    def _around(self, plan: Plan, quota_room_bytes: int | None) -> Surroundings:
        sites = {}
        withheld = self._registry.withheld()
        for row in self._registry.sites():
            session = self._roster.sessions.get(row.id)
            why = withheld[row.id].reason if row.id in withheld else ""
            sites[row.id] = Enrolled(row.id, why, session.capabilities if session is not None else None)
        drain = self._driver.draining
        unknown = [site for site in plan.sites or () if site not in sites]
        refused = f"site {', '.join(unknown)} is not enrolled: a submission is refused" if unknown else ""
        return Surroundings(
            sites=sites,
            free_bytes=shutil.disk_usage(self._store.root).free,
            quota_room_bytes=quota_room_bytes,
            waits_for=[view.state.run for view in self._driver.views() if not view.state.status.final],
            held=drain.says if drain is not None else "",
            refused=refused or self._without_initial(plan),
            odd=[*_missing_files(plan)],
            heartbeat_interval_s=self._heartbeat_interval_s,
        )

    def _without_initial(self, plan: Plan) -> str:
        """Why the model that the plan starts from can't be had; a file of the operator's comes with the submission."""
        initial = plan.training.initial
        if initial is None or initial.endswith(".safetensors"):
            return ""
        try:
            best = self._driver.view(initial).state.best
        except FedimpresError as error:
            return f"training.initial: {error.message}"
        return (
            "" if best is not None else f"training.initial: run {initial} has no finished round to start from"
        )


def _missing_files(plan: Plan) -> list[str]:
    files = {"evaluation.data": plan.evaluation.data, "evaluation.updates_data": plan.evaluation.updates_data}
    return [
        f"{key}: no file {path} at the coordinator: its figures will be missing"
        for key, path in files.items()
        if path is not None and not Path(path).is_file()
    ]
