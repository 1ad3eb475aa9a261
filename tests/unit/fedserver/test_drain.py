"""A drain as the driver keeps it: the round under way is finished, nothing else begins, agents are told."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from fedserver import round_events as ev
from fedserver.drain import Drain
from fedserver.round_state import Stage, Status
from fedserver.round_work import Aggregate
from tests.unit.fedserver.test_round_driver import SITES, World, make_plan, served, to_training

DRAIN = Drain.begun("ann", "new disk", 1000.0)


def go(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 20))


def test_the_round_under_way_is_finished_and_the_next_run_stays_queued(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        async with served(world) as driver:
            run, sessions = await to_training(world, driver)
            following = await driver.submit(make_plan(), request_id=None, by="ann")
            driver.drain(DRAIN)
            assert driver.under_way() == f"run {run}, round 1: training"
            for session in sessions:
                told = [session.outbox.get_nowait() for _ in range(session.outbox.qsize())][-1]
                assert told is not None
                assert told.drain.reason == "new disk"
            for site in SITES:
                await driver.post(run, world.stored(site, world.artifact(site.encode())))
            merged = world.artifact(b"n")
            await world.answer(
                Aggregate,
                lambda _: ev.AggregationFinished(at=3, round=1, model=merged, accepted=SITES, rejected={}),
            )
            await world.until(lambda: driver.view(run).state.stage is Stage.EVALUATING)
            for site in SITES:
                await driver.post(run, ev.EvaluationReported(at=4, round=1, site=site, metrics=()))
            assert driver.view(run).state.status is Status.DONE
            await asyncio.sleep(0.6)  # two ticks
            assert driver.view(following).state.status is Status.QUEUED
            assert driver.under_way() == ""
            assert "new disk" in driver.waiting_for(driver.view(following))
            driver.drain(None)
            await world.until(lambda: driver.view(following).state.status is Status.RUNNING)

    go(story())


def test_waiting_for_sites_begins_anew_when_a_drain_is_undone(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        async with served(world) as driver:
            run = await driver.submit(make_plan(limits={"round_deadline_s": 60}), request_id=None, by="ann")
            await world.initialise()
            await world.until(lambda: driver.view(run).state.stage is Stage.OPENING)
            driver.drain(DRAIN)
            world.clock.advance(3600)
            driver.drain(None)
            await asyncio.sleep(0.6)  # two ticks
            assert driver.view(run).state.status is Status.WAITING, "the hour was no waiting for sites"
            world.clock.advance(61)
            await world.until(lambda: driver.view(run).state.status is Status.FAILED)

    go(story())


def test_a_fact_that_is_not_durable_yet_is_the_journals_lag(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        async with served(world) as driver:
            run, _ = await to_training(world, driver)
            assert driver.journal_lag_s() == 0.0
            held, free = asyncio.Event(), asyncio.get_running_loop().create_future()

            async def hold(events: object) -> None:
                held.set()
                await free

            driver._journal.append = hold  # type: ignore[method-assign]
            posting = asyncio.create_task(driver.post(run, ev.TaskStarted(at=1, round=1, site="a")))
            await held.wait()
            world.clock.advance(3)
            assert driver.journal_lag_s() == 3.0
            free.set_result(None)
            await posting
            assert driver.journal_lag_s() == 0.0

    go(story())
