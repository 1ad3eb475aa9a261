"""Models that go, on a real journal and store: the files, the record, a restart between journal and deletion, a refusal."""

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedcore.audit_store import AuditLog
from fedcore.errors import ComputeError, QuotaError
from fedcore.plan import Plan
from fedcore.plan_forecast import Sizes
from fedcore.round_record import RoundRecord
from fedserver import round_events as ev
from fedserver.dry_run import DryRun
from fedserver.forecast import Measure
from fedserver.journal import Journal
from fedserver.model_keeper import ModelKeeper, Usage
from fedserver.round_driver import RoundDriver
from fedserver.round_state import Stage
from fedserver.round_work import Aggregate
from tests.unit.fedserver.test_round_driver import World, go, make_plan, served

GIB = 1 << 30


def record(number: int, model: str, validated: float) -> str:
    return RoundRecord(
        round=number, expected=1, registered=1, started=1, reported=1, aggregated=1, accuracy=None,
        balanced_accuracy=None, validation_accuracy=validated, model=model,
    ).model_dump_json()  # fmt: skip


def round_of(number: int, model: str) -> list[ev.Event]:
    """A whole round of site a, as the journal has it; the first is the best."""
    report = ev.Report(num_examples=1)
    update = {"site": "a", "digest": "0" * 64, "payload_bytes": 1, "report": report}
    return [
        ev.RoundOpened(at=1, round=number, attempt=1, expected=("a",), registered=("a",), reason="r"),
        ev.UpdateStored(at=1, round=number, **update),
        ev.CollectionClosed(at=1, round=number, reason="r"),
        ev.AggregationFinished(at=1, round=number, model=model, accepted=("a",), rejected={}),
        ev.EvaluationReported(at=1, round=number, site="a", metrics=()),
        ev.RoundFinished(at=1, round=number, record_json=record(number, model, 1 / number)),
    ]


async def finished_run(world: World, plan: Plan, rounds: int, *, over: bool = True) -> tuple[str, list[str]]:
    """A run in the journal, with a model of each round in the store; not yet known to the driver."""
    run = f"t-{rounds}"
    journal = Journal(world.database)
    await journal.submit(run, plan, request_id=None, submitted_by="o")
    models = [world.artifact(bytes([number])) for number in range(rounds + 1)]
    events: list[ev.Event] = [
        ev.RunStarted(at=1, sites=("a",), synthesises=False),
        ev.RunInitialised(
            at=1, model=models[0], update_tensors=(), local_tensors=(), objective="o", objective_options_json="{}"
        ),
        *(event for number in range(1, rounds + 1) for event in round_of(number, models[number])),
    ]  # fmt: skip
    if over:
        events.append(ev.RunFinished(at=1, status="DONE", reason="r"))
    await journal.append([(run, event) for event in events])
    return run, models


def keeper(world: World, quota_bytes: int | None) -> ModelKeeper:
    return ModelKeeper(world.driver, world.store, AuditLog(world.database), quota_bytes)


async def merging(world: World, driver: RoundDriver) -> str:
    """A run whose first round is being merged."""
    world.connect("a")
    run = await driver.submit(make_plan(rounds=2, min_sites=1, sites=["a"]), request_id=None, by="ann")
    await world.initialise()
    await world.until(lambda: driver.view(run).state.stage is Stage.TRAINING)
    await driver.post(run, world.stored("a", world.artifact(b"u")))
    await world.until(lambda: driver.view(run).state.stage is Stage.AGGREGATING)
    return run


@pytest.mark.parametrize("over", [True, False])
def test_a_quota_takes_old_rounds_leaves_best_and_last_and_is_recorded(tmp_path: Path, over: bool) -> None:
    async def story() -> None:
        world = World(tmp_path)
        plan = make_plan(rounds=9, min_sites=1, sites=["a"])
        run, models = await finished_run(world, plan, 5, over=over)
        size = world.store.path(models[0]).stat().st_size
        async with served(world) as driver:
            await keeper(world, None).look()
            assert not driver.view(run).state.dropped
            # The first model, which the run left behind, is swept later; it counts.
            await keeper(world, 4 * size).look()
            state = driver.view(run).state
            assert list(state.dropped) == [2, 3]
            assert set(world.store.digests()) == {models[n] for n in (0, 1, 4, 5)}
            await keeper(world, 1).look()
            assert list(driver.view(run).state.dropped) == ([2, 3, 4] if over else [2, 3])
            left = (3 if over else 4) * size
            assert await keeper(world, 1).usage() == Usage(left, left, 1)
            assert driver.view(run).state.status.final is over
            facts = [entry.document for entry in AuditLog(world.database).entries()]
            assert {fact["action"] for fact in facts} == {"models.drop"}
            rounds = ["2-3", "4"] if over else ["2-3"]
            assert [(f["object"], f["detail"]["rounds"]) for f in facts] == [
                (f"run/{run}", r) for r in rounds
            ]

    go(story())


def test_a_model_that_another_run_has_just_made_again_is_not_deleted(tmp_path: Path) -> None:
    """The same plan and seed make the same bytes: one run gives them up while they come into being for another."""

    async def story() -> None:
        world = World(tmp_path)
        plan = make_plan(rounds=5, min_sites=1, sites=["a"])
        over, models = await finished_run(world, plan, 5)
        shared = models[3]
        async with served(world) as driver:
            run = await merging(world, driver)
            # The merge has stored its result, and has not told of it yet.
            world.compute.unrecorded[shared] = run
            await driver.post(over, ev.ModelsDropped(at=9, rounds=(2,), reason="quota"))
            assert models[2] not in world.store
            await driver.post(over, ev.ModelsDropped(at=9, rounds=(3,), reason="quota"))
            assert shared in world.store
            merged = ev.AggregationFinished(at=9, round=1, model=shared, accepted=("a",), rejected={})
            await world.answer(Aggregate, lambda command: merged)
            await world.until(lambda: driver.view(run).state.stage is Stage.EVALUATING)
            assert not world.compute.unrecorded
            assert shared in world.store

    go(story())


@pytest.mark.parametrize("first", ["drop", "merge"])
def test_a_drop_and_a_merge_in_one_batch_leave_what_the_merge_needs(tmp_path: Path, first: str) -> None:
    async def story() -> None:
        world = World(tmp_path)
        over, models = await finished_run(world, make_plan(rounds=5, min_sites=1, sites=["a"]), 5)
        async with served(world) as driver:
            run = await merging(world, driver)
            facts: list[tuple[str, ev.Event]] = [
                (over, ev.ModelsDropped(at=9, rounds=(3,), reason="quota")),
                (run, ev.AggregationFinished(at=9, round=1, model=models[3], accepted=("a",), rejected={})),
            ]
            await asyncio.gather(
                *(driver.post(*fact) for fact in (facts if first == "drop" else facts[::-1]))
            )
            assert models[3] in world.store

    go(story())


def test_a_model_that_a_submission_starts_from_is_not_deleted_meanwhile(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        run, models = await finished_run(world, make_plan(rounds=5, min_sites=1, sites=["a"]), 5)
        async with served(world) as driver:
            with driver.promised(models[2]), driver.promised(None):
                await driver.post(run, ev.ModelsDropped(at=9, rounds=(2, 3), reason="quota"))
            assert models[2] in world.store
            assert models[3] not in world.store

    go(story())


def test_what_a_crash_after_the_journal_left_goes_at_the_start(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        run, models = await finished_run(world, make_plan(rounds=5, min_sites=1, sites=["a"]), 5)
        drop = ev.ModelsDropped(at=1e9, rounds=(2, 3), reason="quota")
        await Journal(world.database).append([(run, drop)])
        os.utime(world.store.path(models[2]), (1e9 - 1, 1e9 - 1))
        async with served(world) as driver:
            assert list(driver.view(run).state.dropped) == [2, 3]
            assert models[2] not in world.store
            assert models[3] in world.store, "uploaded since: it is younger than the drop"

    go(story())


def test_a_plan_that_keeps_one_model_needs_no_quota(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        plan = make_plan(rounds=5, min_sites=1, sites=["a"], keep_models=1)
        run, models = await finished_run(world, plan, 5)
        async with served(world) as driver:
            await keeper(world, None).look()
            assert list(driver.view(run).state.dropped) == [2, 3, 4]
            assert {models[1], models[5]} <= set(world.store.digests())

    go(story())


class Work:
    """Finds a plan's sizes, or is busy."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def measure(self, plan: Plan) -> Any:
        if self.error is not None:
            raise self.error
        return Measure(Sizes(model=GIB, update=GIB // 2), "o", False, False, False, False, False)


def test_a_plan_that_the_quota_has_no_room_for_is_refused_with_what_to_do() -> None:
    work, usage = Work(), Usage(20 * GIB, 2 * GIB, None)

    async def used() -> Usage:
        return usage

    nothing = cast(Any, SimpleNamespace())
    dry_run = DryRun(nothing, nothing, nothing, nothing, cast(Any, work), nothing, used, 1.0)
    big, small = make_plan(rounds=10), make_plan(rounds=10, keep_models=1)
    asyncio.run(dry_run.check_quota(big))
    # Ten rounds' models and the first, one being made, two updates of two rounds: 14 GiB. With keep_models: 6 GiB.
    usage = Usage(20 * GIB, 2 * GIB, 15 * GIB)
    with pytest.raises(QuotaError, match=r"needs 14336.0 MiB .* expected at most 13312.0 MiB") as caught:
        asyncio.run(dry_run.check_quota(big))
    assert "keep_models" in caught.value.hint
    asyncio.run(dry_run.check_quota(small))
    usage = Usage(20 * GIB, 2 * GIB, 16 * GIB)
    asyncio.run(dry_run.check_quota(big))
    usage, work.error = Usage(20 * GIB, 2 * GIB, 3 * GIB), ComputeError("died")
    asyncio.run(dry_run.check_quota(big))
