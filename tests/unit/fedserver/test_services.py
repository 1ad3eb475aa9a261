"""Services: long lists in pages, requests of a size that can't be meant, and what ends an agent's stream is told.

Over the wire, with a real coordinator, they are tested in tests/integration.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from fedcore.artifact_store import ArtifactStore
from fedcore.clock import ManualClock
from fedcore.errors import ConflictError, NotFoundError, PlanError, ProtocolError, StorageError
from fedcore.plan import validate_plan
from fedcore.round_record import RoundRecord
from fedcore.tensor_file import TensorManifest, TensorSpec
from fedcore.v1 import admin_pb2, federation_pb2
from fedserver import round_events as ev
from fedserver.finished_round import FinishedRound
from fedserver.journal import Submission
from fedserver.roster import Roster, Session
from fedserver.round_driver import RunView
from fedserver.round_state import Drop, RunState
from fedserver.services.admin import AdminService
from fedserver.services.federation import FederationService

PLAN = validate_plan(
    {"name": "t", "rounds": 2000, "model": {"name": "cnn", "classes": 3, "input": [1, 8, 8]}}
)


class Driver:
    """The round driver's side that services need: views of runs, and facts taken in."""

    def __init__(self, *views: RunView) -> None:
        self._views = {view.state.run: view for view in views}
        self.posted: list[ev.Event] = []
        self.failure: Exception | None = None

    def views(self) -> list[RunView]:
        return list(self._views.values())

    def view(self, run: str) -> RunView:
        if run not in self._views:
            raise NotFoundError(f"no run {run!r}")
        return self._views[run]

    def waiting_for(self, view: RunView) -> str:
        return ""

    def wall(self) -> float:
        return 1.0

    def nudge(self) -> None:
        pass

    async def post(self, run: str, event: ev.Event) -> None:
        if self.failure is not None:
            raise self.failure
        self.posted.append(event)


def stored(store: ArtifactStore) -> str:
    manifest = TensorManifest.of([TensorSpec("w", "F32", (4,))])
    content = manifest.header() + bytes(16)
    path = store.new_path()
    path.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    store.adopt(path, digest)
    return digest


def view_of(run: str, digest: str, rounds: int, note: str = "") -> RunView:
    records = tuple(
        FinishedRound.of(RoundRecord(
            round=n, expected=1, registered=1, started=1, reported=1, aggregated=1, accuracy=None,
            balanced_accuracy=None, balanced_accuracy_note=note, model=digest,
        ).model_dump_json())
        for n in range(1, rounds + 1)
    )  # fmt: skip
    state = RunState(run, PLAN, records=records)
    submission = Submission(run=run, seq=1, request_id=None, submitted_at="", submitted_by="o", plan=PLAN)
    return RunView(submission, state, stage_since=0.0, stage_since_wall=0.0)


def admin(driver: Driver, store: ArtifactStore) -> AdminService:
    roster = Roster(ManualClock(), 9)
    nothing = cast(Any, None)
    return AdminService(
        cast(Any, driver), roster, nothing, nothing, "lab", store, nothing, nothing, nothing, 1 << 30, list, nothing
    )  # fmt: skip


async def pages(call: Any, make: Any, **fields: Any) -> list[Any]:
    replies, token = [], None
    while token != "":
        replies.append(await call(make(page_token=token or "", **fields), None))
        token = replies[-1].next_page_token
    return replies


def test_long_lists_come_in_pages_that_fit_a_message(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    digest = stored(store)
    views = [view_of("a", digest, 3), view_of("b", digest, 1200), view_of("c", "0" * 64, 5)]
    service = admin(Driver(*views), store)

    rounds = asyncio.run(pages(service.ListRounds, admin_pb2.ListRoundsRequest, run="b"))
    lines = [line for reply in rounds for line in reply.records_json]
    assert [RoundRecord.model_validate_json(line).round for line in lines] == list(range(1, 1201))
    assert len(rounds) == 3

    models = asyncio.run(pages(service.ListModels, admin_pb2.ListModelsRequest, run="b"))
    assert [m.round for reply in models for m in reply.models] == list(range(1, 1201))
    everything = asyncio.run(pages(service.ListModels, admin_pb2.ListModelsRequest))
    named = [(m.run, m.round, m.payload_bytes) for reply in everything for m in reply.models]
    assert named == [("a", n, 16) for n in (1, 2, 3)] + [("b", n, 16) for n in range(1, 1201)]
    empty = asyncio.run(pages(service.ListModels, admin_pb2.ListModelsRequest, run="c"))
    assert [list(reply.models) for reply in empty] == [[]]


def test_a_dropped_model_is_listed_where_asked_for_and_its_download_says_when_and_why(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    view = view_of("a", stored(store), 3)
    records = tuple(replace(r, model=f"{r.round}" * 64) for r in view.state.records[:2])
    view.state = replace(
        view.state, records=(*records, view.state.records[2]), dropped={2: Drop(0.0, "a quota")}
    )
    service = admin(Driver(view), store)

    def listed(**fields: bool) -> list[tuple[int, str, str]]:
        request = admin_pb2.ListModelsRequest(run="a", **fields)
        models = asyncio.run(service.ListModels(request, None)).models
        return [(model.round, model.dropped_at, model.dropped_reason) for model in models]

    assert listed() == [(3, "", "")]
    assert listed(dropped=True) == [(2, "1970-01-01T00:00:00+00:00", "a quota"), (3, "", "")]
    assert asyncio.run(service.GetRun(admin_pb2.GetRunRequest(run="a"), None)).models_dropped == "2"

    async def download() -> None:
        async for _ in service.Download(admin_pb2.DownloadRequest(digest="2" * 64), None):
            pass

    with pytest.raises(
        NotFoundError, match="round 2 was dropped at 1970-01-01T00:00:00.*: a quota"
    ) as caught:
        asyncio.run(download())
    assert caught.value.hint == "rounds whose model is there: 1, 3"


def test_pages_of_runs_are_bounded_in_bytes(tmp_path: Path) -> None:
    views = [view_of(f"r{n}", "0" * 64, 1, note="x" * 900_000) for n in range(10)]
    service = admin(Driver(*views), ArtifactStore(tmp_path))
    replies = asyncio.run(pages(service.ListRuns, admin_pb2.ListRunsRequest))
    assert [run.run for reply in replies for run in reply.runs] == [f"r{n}" for n in reversed(range(10))]
    assert [len(reply.runs) for reply in replies] == [4, 4, 2]


def test_a_token_of_another_list_is_refused_or_gives_nothing(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    digest = stored(store)
    service = admin(Driver(view_of("a", digest, 2), view_of("b", digest, 2)), store)
    with pytest.raises(ProtocolError):
        asyncio.run(service.ListRounds(admin_pb2.ListRoundsRequest(run="a", page_token="b/1"), None))
    with pytest.raises(NotFoundError):
        asyncio.run(service.ListModels(admin_pb2.ListModelsRequest(page_token="z/1"), None))
    reply = asyncio.run(service.ListModels(admin_pb2.ListModelsRequest(run="a", page_token="b/1"), None))
    assert not reply.models


def test_a_submission_of_a_size_that_can_not_be_meant_is_refused(tmp_path: Path) -> None:
    service = admin(Driver(), ArtifactStore(tmp_path))
    request = admin_pb2.SubmitRunRequest(plan_toml="#" * (1 << 20) + "ü")
    with pytest.raises(PlanError, match=r"1048578 bytes of TOML, expected at most 1048576 \(1 MiB\)"):
        asyncio.run(service.SubmitRun(request, None))
    with pytest.raises(ProtocolError, match="request id of 201 characters, expected at most 200"):
        asyncio.run(service.SubmitRun(admin_pb2.SubmitRunRequest(request_id="x" * 201), None))


async def said(*messages: federation_pb2.AgentMessage) -> AsyncIterator[federation_pb2.AgentMessage]:
    for message in messages:
        yield message


class Stream:
    """The directive stream of site "a", which says what a test gives it."""

    def __init__(self) -> None:
        self.driver = Driver(view_of("t-1", "0" * 64, 0))
        self.roster = Roster(ManualClock(), 9)
        nothing = cast(Any, None)
        self.service = FederationService("lab", 5.0, cast(Any, self.driver), self.roster, *[nothing] * 8)

    def read(self, *messages: federation_pb2.AgentMessage) -> Session:
        async def scenario() -> Session:
            session = self.roster.open("a", self.roster.greet("a", federation_pb2.Capabilities()))
            await self.service._read(session, said(*messages))
            return session

        return asyncio.run(scenario())


@pytest.fixture
def stream() -> Stream:
    return Stream()


STARTED = federation_pb2.AgentMessage(started=federation_pb2.TaskStarted(run="t-1", round=1))


@pytest.mark.parametrize(
    ("failure", "level", "words"),
    [
        (StorageError("the disk is full", hint="free space"), "warning", "the disk is full (free space)"),
        (ZeroDivisionError("a bug"), "error", None),
    ],
)
def test_what_ends_a_stream_is_told_and_ends_the_session(
    stream: Stream, failure: Exception, level: str, words: str | None
) -> None:
    stream.driver.failure = failure
    with capture_logs() as lines:
        session = stream.read(STARTED)
    (line,) = lines
    assert (line["log_level"], line["site"], line.get("error")) == (level, "a", words)
    assert bool(line.get("exc_info")) is (words is None)
    assert session.outbox.get_nowait() is None


def test_a_message_that_comes_too_late_ends_nothing(stream: Stream) -> None:
    stream.driver.failure = ConflictError("round 1 is over")
    with capture_logs() as lines:
        session = stream.read(STARTED, STARTED)
    assert [line["event"] for line in lines] == ["agent's message came too late"] * 2
    assert session.progress.stage == "starting"


def test_what_an_agent_says_is_kept_as_a_short_line(stream: Stream) -> None:
    evil = "\x1b]0;x\x07\x1b[2J" + "y" * 1_000_000
    session = stream.read(
        federation_pb2.AgentMessage(failed=federation_pb2.TaskFailed(run="t-1", round=1, reason=evil)),
        federation_pb2.AgentMessage(
            failed=federation_pb2.TaskFailed(run="t-1", round=1, reason=evil, evaluating=True)
        ),
        federation_pb2.AgentMessage(
            failed=federation_pb2.TaskFailed(run="t-1", round=1, reason=evil, recalibrating=True)
        ),
        federation_pb2.AgentMessage(
            progress=federation_pb2.Progress(stage=evil, done=1, total=2, loss=float("nan"), images_per_s=9.0)
        ),
        federation_pb2.AgentMessage(capabilities=federation_pb2.Capabilities(unavailable_reason=evil)),
    )
    let_go, not_evaluated, not_measured = stream.driver.posted
    assert isinstance(let_go, ev.SiteLetGo)
    assert isinstance(not_evaluated, ev.EvaluationLetGo)
    assert isinstance(not_measured, ev.StatisticsLetGo)
    for text in (
        let_go.reason,
        not_evaluated.reason,
        not_measured.reason,
        session.progress.stage,
        session.capabilities.unavailable_reason,
    ):
        assert text.startswith("]0;x[2Jyyy")
        assert text.isprintable()
        assert len(text) <= 500
    assert (session.progress.loss, session.progress.images_per_s) == (0.0, 9.0)


def test_figures_that_can_not_be_become_an_evaluation_let_go(stream: Stream) -> None:
    bad = federation_pb2.SplitMetrics(
        split="test", num_examples=10, num_correct=6, class_totals=[1, 9, 0], class_correct=[6, 0, 0]
    )
    good = federation_pb2.SplitMetrics(split="test", num_examples=10, num_correct=6)
    for split in (bad, good):
        report = federation_pb2.EvaluationReport(run="t-1", round=1, splits=[split])
        stream.read(federation_pb2.AgentMessage(evaluation=report))
    refused, taken = stream.driver.posted
    assert isinstance(refused, ev.EvaluationLetGo)
    assert refused.reason == "a round 1: says that 6 of 1 test images of class 0 are recognised"
    assert isinstance(taken, ev.EvaluationReported)
