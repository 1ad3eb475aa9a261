"""Deliveries over a real store and spool: what stays after a cut, who gives way to whom, what is swept.

Over the wire, with a real coordinator, they are tested in tests/integration/test_refusals.py.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedcore.artifact_store import ArtifactStore
from fedcore.clock import ManualClock
from fedcore.errors import (
    ConflictError,
    NotFoundError,
    OverloadedError,
    ProtocolError,
    TruncatedStreamError,
)
from fedcore.plan import validate_plan
from fedcore.tensor_file import TensorManifest, TensorSpec
from fedcore.tensor_stream import manifest_to_proto
from fedcore.v1 import federation_pb2, tensor_pb2
from fedserver import round_events as ev
from fedserver.deliveries import Deliveries
from fedserver.roster import Roster
from fedserver.round_driver import RoundDriver
from fedserver.round_machine import apply
from fedserver.round_state import RunState
from fedserver.turns import Turns

Part = federation_pb2.DeliverPart
Outcome = federation_pb2.DeliverReply
PLAN = validate_plan({"name": "t", "rounds": 1, "model": {"name": "cnn", "classes": 3, "input": [1, 8, 8]}})
SPEC = TensorSpec("w", "F32", (256,))
MANIFEST = TensorManifest.of([SPEC])
STEP = 128


class Driver:
    """The round driver's side that deliveries need: states, and facts applied at once."""

    def __init__(self) -> None:
        self.discarded: list[str] = []
        self.state = RunState("t-1234", PLAN)
        for event in (
            ev.RunStarted(at=0, sites=("a", "b"), synthesises=False),
            ev.RunInitialised(
                at=0, model="m", update_tensors=(("w", "F32", (256,)),), local_tensors=(), objective="o",
                objective_options_json="{}",
            ),
            ev.RoundOpened(at=0, round=1, attempt=1, expected=("a", "b"), registered=("a", "b"), reason=""),
        ):  # fmt: skip
            self.state = apply(self.state, event)

    def view(self, run: str) -> Any:
        if not run or not self.state.run.startswith(run):
            raise NotFoundError(f"no run {run!r}")
        return SimpleNamespace(state=self.state)

    def wall(self) -> float:
        return 1.0

    def discard_unneeded(self, digest: str) -> None:
        self.discarded.append(digest)

    async def post(self, run: str, event: ev.Event) -> RunState:
        await asyncio.sleep(0)
        self.state = apply(self.state, event)
        return self.state


class Case:
    def __init__(self, root: Path) -> None:
        self.driver = Driver()
        self.store = ArtifactStore(root / "artifacts")
        self.spool = root / "spool"
        self.pool = ThreadPoolExecutor(2)
        self.deliveries = self.reopen()

    def reopen(self, max_site_bytes: int = 1 << 30) -> Deliveries:
        """What a restart of the coordinator makes."""
        driver = cast(RoundDriver, self.driver)
        return Deliveries(
            driver, self.store, Roster(ManualClock(), 9), self.spool, self.pool, Turns(8), max_site_bytes
        )

    def parts(self) -> list[Path]:
        return sorted(self.spool.glob("*.part"))


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    made = Case(tmp_path)
    yield made
    made.pool.shutdown()


class Update:
    def __init__(self, value: int, site: str = "a") -> None:
        self.payload = bytes([value]) * SPEC.size_bytes
        self.digest = hashlib.sha256(MANIFEST.header() + self.payload).hexdigest()
        self.key = federation_pb2.DeliveryKey(run="t-1234", round=1, site=site, digest=self.digest)
        self.header = federation_pb2.DeliveryHeader(
            key=self.key,
            manifest=manifest_to_proto(MANIFEST, self.digest),
            report=federation_pb2.UpdateReport(num_examples=1),
        )

    def chunks(self, start: int = 0, end: int | None = None) -> list[Part]:
        payload = self.payload[:end]
        return [
            Part(chunk=tensor_pb2.Chunk(offset=at, data=payload[at : at + STEP]))
            for at in range(start, len(payload), STEP)
        ]


async def stream(parts: Iterable[Part], then: asyncio.Event | None = None) -> AsyncIterator[Part]:
    for part in parts:
        yield part
    if then is not None:
        await then.wait()


def go(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 120))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.002)


def test_stored_then_answered_again_then_too_late(case: Case) -> None:
    async def story() -> None:
        update, second = Update(1), Update(2)
        receive = case.deliveries.receive
        assert await receive("a", update.header, stream(update.chunks())) == Outcome.OUTCOME_STORED
        assert case.store.intact(update.digest)
        assert case.parts() == []
        assert await receive("a", update.header, stream([])) == Outcome.OUTCOME_ALREADY_STORED
        assert await receive("a", second.header, stream(second.chunks())) == Outcome.OUTCOME_TOO_LATE
        assert case.deliveries.offset("a", update.key).stored
        assert second.digest not in case.store

    go(story())


def test_a_cut_keeps_what_came_also_over_a_restart(case: Case) -> None:
    async def story() -> None:
        update = Update(3)
        with pytest.raises(TruncatedStreamError):
            await case.deliveries.receive("a", update.header, stream(update.chunks(end=3 * STEP)))
        assert case.deliveries.offset("a", update.key).offset == 3 * STEP
        again = case.reopen()
        assert again.offset("a", update.key).offset == 3 * STEP
        with case.parts()[0].open("ab") as file:
            file.write(b"\x03\x03\x03")  # a chunk was being written when the power went
        assert again.offset("a", update.key).offset == 3 * STEP
        parts = stream(update.chunks(3 * STEP))
        assert await again.receive("a", update.header, parts) == Outcome.OUTCOME_STORED

    go(story())


def test_a_newer_stream_takes_over_from_one_that_hangs(case: Case) -> None:
    async def story() -> None:
        update, never = Update(4), asyncio.Event()
        older = asyncio.create_task(
            case.deliveries.receive("a", update.header, stream(update.chunks(end=2 * STEP), never))
        )
        await until(lambda: case.deliveries.offset("a", update.key).offset == 2 * STEP)
        newer = stream(update.chunks(2 * STEP))
        assert await case.deliveries.receive("a", update.header, newer) == Outcome.OUTCOME_STORED
        with pytest.raises(ConflictError, match="a newer stream"):
            await older
        assert case.deliveries._streams == case.deliveries._locks == {}

    go(story())


def test_one_site_has_so_much_on_its_way_in_and_others_are_not_kept_out(case: Case) -> None:
    async def story() -> None:
        ours = case.reopen(max_site_bytes=SPEC.size_bytes)
        first, second, cut = Update(1), Update(2), asyncio.Event()
        under_way = asyncio.create_task(ours.receive("a", first.header, stream(first.chunks(end=STEP), cut)))
        await until(lambda: ours.offset("a", first.key).offset == STEP)
        with pytest.raises(OverloadedError, match="a: 1024 bytes more, with 1024 on their way in already"):
            await ours.receive("a", second.header, stream(second.chunks()))
        other = Update(3, "b")
        assert await ours.receive("b", other.header, stream(other.chunks())) == Outcome.OUTCOME_STORED
        cut.set()
        with pytest.raises(TruncatedStreamError):
            await under_way
        assert await ours.receive("a", second.header, stream(second.chunks())) == Outcome.OUTCOME_STORED
        assert ours._incoming == {}

    go(story())


def test_streams_of_several_updates_do_not_meet(case: Case) -> None:
    async def story() -> None:
        updates = [Update(5, "a"), Update(6, "b"), Update(5, "b")]
        results = await asyncio.gather(
            *(case.deliveries.receive(u.key.site, u.header, stream(u.chunks())) for u in updates)
        )
        assert results[0] == Outcome.OUTCOME_STORED
        assert sorted(results[1:]) == [Outcome.OUTCOME_STORED, Outcome.OUTCOME_TOO_LATE]
        assert case.driver.discarded == [updates[1 + results[1:].index(Outcome.OUTCOME_TOO_LATE)].digest]

    go(story())


def test_a_new_digest_takes_the_place_of_what_was_left_of_another(case: Case) -> None:
    async def story() -> None:
        first, second = Update(8), Update(9)
        for update in (first, second):
            with pytest.raises(TruncatedStreamError):
                await case.deliveries.receive("a", update.header, stream(update.chunks(end=STEP)))
        assert len(case.parts()) == 1
        assert case.deliveries.offset("a", first.key).offset == 0
        assert case.deliveries.offset("a", second.key).offset == STEP

    go(story())


def test_a_cancelled_call_leaves_a_part_that_can_be_resumed(case: Case) -> None:
    async def story() -> None:
        update, never = Update(7), asyncio.Event()
        call = asyncio.create_task(
            case.deliveries.receive("a", update.header, stream(update.chunks(end=4 * STEP), never))
        )
        await until(lambda: case.deliveries.offset("a", update.key).offset == 4 * STEP)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert case.deliveries._streams == case.deliveries._locks == {}
        parts = stream(update.chunks(4 * STEP))
        assert await case.deliveries.receive("a", update.header, parts) == Outcome.OUTCOME_STORED

    go(story())


def test_parts_of_rounds_that_are_over_are_swept(case: Case) -> None:
    names = [
        "t-1234~1~a~00.part",
        "t-1234~0~a~00.part",
        "t-1234~2~a~00.part",
        "gone-99~1~a~00.part",
        "t-12~1~a~00.part",
    ]
    for name in names:
        (case.spool / name).write_bytes(b"x")
    case.reopen()
    assert [path.name for path in case.parts()] == names[:1]
    case.driver.state = apply(case.driver.state, ev.RunFinished(at=9, status="ABORTED", reason=""))
    case.reopen()
    assert case.parts() == []


def test_a_second_header_and_unknown_runs(case: Case) -> None:
    async def story() -> None:
        update = Update(8)
        twice = [*update.chunks(end=STEP), Part(header=update.header)]
        with pytest.raises(ProtocolError, match="a round 1: expected a chunk, got a second header"):
            await case.deliveries.receive("a", update.header, stream(twice))
        for run in ("t-123", "", "x"):
            update.header.key.run = update.key.run = run
            with pytest.raises(NotFoundError):
                await case.deliveries.receive("a", update.header, stream(update.chunks()))
            with pytest.raises(NotFoundError):
                case.deliveries.offset("a", update.key)

    go(story())
