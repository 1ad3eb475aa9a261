"""The driver over a real journal, store and roster: what is durable, what is under way, and what a restart finds.

Compute is a stand-in that answers when it is told to, so that every moment can be held still.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from fedcore.artifact_store import ArtifactStore
from fedcore.clock import ManualClock
from fedcore.database import open_database
from fedcore.errors import ConflictError, NotFoundError, PlanError, StorageError
from fedcore.plan import Plan, validate_plan
from fedcore.tensor_file import TensorSpec, write_tensor_file
from fedcore.v1 import federation_pb2
from fedserver import round_events as ev
from fedserver.compute_work import ComputeCommand, ComputeWork
from fedserver.journal import Journal
from fedserver.roster import Roster, Session
from fedserver.round_decisions import Withheld
from fedserver.round_driver import RoundDriver
from fedserver.round_state import RunState, Stage, Status
from fedserver.round_work import Aggregate, Initialise
from fedserver.schema import MIGRATIONS

SITES = ("a", "b")
ABLE = federation_pb2.Capabilities(models=["cnn"], objectives=["cross_entropy"])


def make_plan(**changes: object) -> Plan:
    return validate_plan(
        {
            "name": "t", "rounds": 1, "min_sites": 2, "strategy": "fedavg", "sites": list(SITES),
            "model": {"name": "cnn", "classes": 3, "input": [1, 8, 8]}, **changes,
        }
    )  # fmt: skip


class SlowCompute:
    """Commands wait in `asked` until the story answers them."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[tuple[ComputeCommand, asyncio.Future[ev.Event]]] = asyncio.Queue()
        self.withdrawn: list[ComputeCommand] = []
        self.interrupted = False
        self.unrecorded: dict[str, str] = {}

    async def perform(
        self, state: RunState, command: ComputeCommand, initial: object, said: object
    ) -> ev.Event:
        answer: asyncio.Future[ev.Event] = asyncio.get_running_loop().create_future()
        self.asked.put_nowait((command, answer))
        try:
            return await answer
        except asyncio.CancelledError:
            self.withdrawn.append(command)
            try:
                await asyncio.sleep(0.6)  # two ticks of the driver: a compute process takes its time to stop
            except asyncio.CancelledError:
                self.interrupted = True
            raise


class World:
    def __init__(self, root: Path, create: bool = True) -> None:
        self.root = root
        self.clock = ManualClock(50.0)
        self.database = open_database(root / "db", MIGRATIONS, create=create)
        self.store = ArtifactStore(root / "artifacts")
        self.roster = Roster(self.clock, 10)
        self.compute = SlowCompute()
        self.withheld: dict[str, Withheld] = {}
        self.driver = RoundDriver(
            Journal(self.database), self.store, self.roster, cast(ComputeWork, self.compute), self.clock,
            lambda plan: plan.sites or (), lambda plan: False, lambda: self.withheld,
        )  # fmt: skip

    def artifact(self, value: bytes) -> str:
        path = self.store.new_path()
        digest = write_tensor_file(path, {"w": (TensorSpec("w", "F32", (1,)), value * 4)})
        self.store.adopt(path, digest, durable=False)
        return digest

    def connect(self, *sites: str) -> list[Session]:
        sessions = [self.roster.open(site, self.roster.greet(site, ABLE)) for site in sites]
        self.driver.nudge()
        return sessions

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                await asyncio.sleep(0.005)

    async def answer(self, kind: type[Any], event: Callable[[Any], ev.Event]) -> None:
        command, answer = await asyncio.wait_for(self.compute.asked.get(), 60)
        assert isinstance(command, kind)
        answer.set_result(event(command))

    async def initialise(self) -> str:
        model = self.artifact(b"m")
        await self.answer(
            Initialise,
            lambda command: ev.RunInitialised(
                at=1, model=model, update_tensors=(("w", "F32", (1,)),), local_tensors=(),
                objective="cross_entropy", objective_options_json="{}",
            ),
        )  # fmt: skip
        return model

    def stored(self, site: str, digest: str) -> ev.UpdateStored:
        report = ev.Report(num_examples=1)
        return ev.UpdateStored(at=2, round=1, site=site, digest=digest, payload_bytes=4, report=report)


@asynccontextmanager
async def served(world: World) -> AsyncIterator[RoundDriver]:
    world.driver.recover()
    task = asyncio.create_task(world.driver.serve())
    try:
        yield world.driver
        assert not task.done(), task.exception()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        world.database.close()


def go(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 120))


def directives(session: Session) -> list[str | None]:
    kinds = []
    while not session.outbox.empty():
        directive = session.outbox.get_nowait()
        kinds.append(directive.WhichOneof("directive") if directive is not None else None)
    return kinds


async def to_training(world: World, driver: RoundDriver) -> tuple[str, list[Session]]:
    sessions = world.connect(*SITES)
    run = await driver.submit(make_plan(), request_id=None, by="ann")
    await world.initialise()
    await world.until(lambda: driver.view(run).state.stage is Stage.TRAINING)
    await world.until(lambda: all(session.assignment for session in sessions))
    return run, sessions


def test_a_round_from_directive_to_record(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        async with served(world) as driver:
            run, sessions = await to_training(world, driver)
            assert [directives(session)[-1] for session in sessions] == ["train", "train"]
            updates = [world.artifact(bytes([n])) for n in range(2)]
            for site, digest in zip(SITES, updates, strict=True):
                assert driver.view(run).state.awaits_update(site, 1)
                await driver.post(run, world.stored(site, digest))
                assert not driver.view(run).state.awaits_update(site, 1)
            merged = world.artifact(b"n")
            seen: list[Aggregate] = []
            await world.answer(
                Aggregate,
                lambda command: (
                    seen.append(command)
                    or ev.AggregationFinished(at=3, round=1, model=merged, accepted=SITES, rejected={})
                ),
            )
            assert [update[:2] for update in seen[0].updates] == list(zip(SITES, updates, strict=True))
            for site in SITES:
                await world.until(lambda: driver.view(run).state.stage is Stage.EVALUATING)
                await driver.post(run, ev.EvaluationReported(at=4, round=1, site=site, metrics=()))
            assert driver.view(run).state.status is Status.DONE
            assert not any(digest in world.store for digest in updates), (
                "updates of a round that is over stay"
            )
            assert merged in world.store

    go(story())


def test_a_restart_goes_on_with_exactly_what_is_missing(tmp_path: Path) -> None:
    async def before() -> None:
        world = World(tmp_path)
        async with served(world) as driver:
            run, _ = await to_training(world, driver)
            await driver.post(run, world.stored("a", world.artifact(b"1")))

    async def after() -> None:
        world = World(tmp_path, create=False)
        async with served(world) as driver:
            (view,) = driver.views()
            assert (view.state.stage, view.state.current.outstanding) == (Stage.TRAINING, ("b",))
            sessions = world.connect(*SITES)
            await world.until(lambda: sessions[1].assignment)
            assert [directives(session) for session in sessions] == [["stop"], ["train"]]
            again = world.stored("a", "0" * 64)
            with pytest.raises(ConflictError):
                await driver.post(view.state.run, again)
            await driver.post(view.state.run, world.stored("b", world.artifact(b"2")))
            command, _ = await asyncio.wait_for(world.compute.asked.get(), 60)
            assert [site for site, _, _ in command.updates] == ["a", "b"]

    go(before())
    go(after())


def test_an_abort_withdraws_computing_once_and_tells_the_sites(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        async with served(world) as driver:
            run, sessions = await to_training(world, driver)
            for session in sessions:
                directives(session)
            await driver.post(run, ev.RunFinished(at=9, status="ABORTED", reason="x"))
            await world.until(lambda: all(session.assignment is None for session in sessions))
            assert [directives(session) for session in sessions] == [["stop"], ["stop"]]
            second = await driver.submit(make_plan(), request_id=None, by="ann")
            await asyncio.wait_for(world.compute.asked.get(), 60)
            await driver.post(second, ev.RunFinished(at=9, status="ABORTED", reason="x"))
            await world.until(lambda: world.compute.withdrawn)
            await asyncio.sleep(0.7)
            assert not world.compute.interrupted, "a command in withdrawal is not withdrawn again"

    go(story())


def test_a_late_result_of_an_aborted_run_changes_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        async with served(world) as driver:
            run, _ = await to_training(world, driver)
            await driver.post(run, ev.RunFinished(at=9, status="ABORTED", reason="x"))
            with pytest.raises(ConflictError, match="is over"):
                await driver.post(run, world.stored("a", "0" * 64))
            assert driver.view(run).state.status is Status.ABORTED

    go(story())


def test_facts_about_unknown_runs_are_refused_and_the_loop_lives(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        async with served(world) as driver:
            run, _ = await to_training(world, driver)
            for name in ("nobody", "", run[:-1]):
                with pytest.raises(NotFoundError, match="no run"):
                    await driver.post(name, world.stored("a", "0" * 64))
            assert driver.view(run[:-1]).state.run == run
            await driver.post(run, world.stored("a", world.artifact(b"1")))

    go(story())


def test_what_the_journal_could_not_take_did_not_happen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        world = World(tmp_path)
        async with served(world) as driver:
            run, _ = await to_training(world, driver)
            event = world.stored("a", world.artifact(b"1"))

            async def full(self: Journal, events: object) -> None:
                raise StorageError("disk full")

            with monkeypatch.context() as patch:
                patch.setattr(Journal, "append", full)
                with pytest.raises(StorageError, match="disk full"):
                    await driver.post(run, event)
            assert driver.view(run).state.current.reported == {}
            await driver.post(run, event)
            assert set(driver.view(run).state.current.reported) == {"a"}

    go(story())


def test_one_run_at_a_time_and_the_same_request_once(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        async with served(world) as driver:
            first = await driver.submit(make_plan(), request_id="q1", by="ann")
            second = await driver.submit(make_plan(), request_id="q2", by="ann")
            assert await driver.submit(make_plan(), request_id="q1", by="ann") == first
            await asyncio.wait_for(world.compute.asked.get(), 60)
            statuses = [driver.view(run).state.status for run in (first, second)]
            assert statuses == [Status.RUNNING, Status.QUEUED]
            assert driver.active() is driver.view(first)
            with pytest.raises(ConflictError, match="is the beginning of 2 runs"):
                driver.view("t-")
            await driver.post(first, ev.RunFinished(at=9, status="ABORTED", reason="x"))
            await world.until(lambda: driver.view(second).state.status is Status.RUNNING)

    go(story())


def test_too_few_sites_fail_the_run_with_its_reason(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        async with served(world) as driver:
            run = await driver.submit(make_plan(sites=None), request_id=None, by="ann")
            await world.until(lambda: driver.view(run).state.status.final)
            assert driver.view(run).state.status is Status.FAILED
            assert (
                "min_sites is 2, but only 0 sites are enrolled and enabled" in driver.view(run).state.reason
            )

    go(story())


def test_artifacts_are_readable_by_the_sites_of_the_run_only(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        async with served(world) as driver:
            run, _ = await to_training(world, driver)
            model, other = driver.view(run).state.model, world.artifact(b"x")
            assert driver.readable_by("a", model) == world.store.path(model)
            for site, digest in (("stranger", model), ("a", other), ("a", "../../x"), ("a", "")):
                with pytest.raises(NotFoundError, match=f"{site}: artifact"):
                    driver.readable_by(site, digest)

    go(story())


def test_a_run_whose_strategy_is_gone_fails_and_the_next_one_starts(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)

        def synthesises(plan: Plan) -> bool:
            if plan.name == "gone":
                raise PlanError("plan: unknown strategy 'theirs'")
            return False

        world.driver._synthesises = synthesises
        async with served(world) as driver:
            gone = await driver.submit(make_plan(name="gone"), request_id=None, by="ann")
            after = await driver.submit(make_plan(), request_id=None, by="ann")
            await world.until(lambda: driver.view(after).state.status is Status.RUNNING)
            state = driver.view(gone).state
            assert (state.status, "unknown strategy" in state.reason) == (Status.FAILED, True)

    go(story())


def test_a_model_that_is_missing_on_disk_fails_its_run_only(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        async with served(world) as driver:
            run = await driver.submit(make_plan(), request_id=None, by="ann")
            model = await world.initialise()
            world.store.delete(model)
            world.connect(*SITES)
            await world.until(lambda: driver.view(run).state.status is Status.FAILED)
            assert model in driver.view(run).state.reason
            following = await driver.submit(make_plan(), request_id=None, by="ann")
            await world.until(lambda: driver.view(following).state.status is Status.RUNNING)

    go(story())


def test_a_command_that_fails_in_an_unforeseen_way_is_told_once(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        tries = 0

        async def perform(*_: object) -> ev.Event:
            nonlocal tries
            tries += 1
            raise OSError("no more processes")

        world.compute.perform = perform  # type: ignore[method-assign]
        world.compute.failed = (  # type: ignore[attr-defined]
            lambda command, reason: ev.RunFinished(at=1, status="FAILED", reason=reason)
        )
        async with served(world) as driver:
            run = await driver.submit(make_plan(), request_id=None, by="ann")
            await world.until(lambda: driver.view(run).state.status is Status.FAILED)
            assert (tries, driver.view(run).state.reason) == (1, "OSError: no more processes")

    go(story())


def test_a_submission_that_was_cut_after_the_journal_is_there_for_the_retry(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        async with served(world) as driver:
            await Journal(world.database).submit("t-0", make_plan(), request_id="q", submitted_by="ann")
            run = await driver.submit(make_plan(), request_id="q", by="ann")
            assert (run, driver.view("t-0").state.run) == ("t-0", "t-0")

    go(story())


def test_what_came_too_late_goes_unless_a_run_needs_the_same_bytes(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        async with served(world) as driver:
            run, _ = await to_training(world, driver)
            late, model = world.artifact(b"9"), driver.view(run).state.model
            assert model is not None
            driver.discard_unneeded(late)
            driver.discard_unneeded(model)
            assert late not in world.store
            assert model in world.store

    go(story())


def test_a_command_that_hangs_is_ended_at_the_rounds_deadline(tmp_path: Path) -> None:
    async def story() -> None:
        world = World(tmp_path)
        world.compute.failed = (  # type: ignore[attr-defined]
            lambda command, reason: ev.RunFinished(at=1, status="FAILED", reason=reason)
        )
        async with served(world) as driver:
            run = await driver.submit(make_plan(limits={"round_deadline_s": 0.3}), request_id=None, by="ann")
            await world.until(lambda: driver.view(run).state.status is Status.FAILED)
            assert "longer than round_deadline_s = 0.3 s" in driver.view(run).state.reason
            assert [type(command) for command in world.compute.withdrawn] == [Initialise]

    go(story())
