"""The agent's loop and its tasks at their edges: bugs, hostile names, names that are no UTF-8, other runs' leftovers."""

import asyncio
import json
import os
import textwrap
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from fedagent.agent_machine import is_run, stopped
from fedagent.audit import SiteAudit, open_site_audit
from fedagent.config import AgentConfig, AgentHome
from fedagent.driver import AgentDriver
from fedagent.gate import SiteGate
from fedagent.pause import pause, resume
from fedagent.policy import SitePolicy
from fedagent.tasks import Tasks
from fedagent.transfer import Transfers, load_record
from fedcore.artifact_store import ArtifactStore
from fedcore.compute_host import ComputeHost
from fedcore.errors import StorageError, UnreachableError
from fedcore.tensor_file import TensorSpec, write_tensor_file
from fedcore.v1 import federation_pb2, tensor_pb2

# A compute process whose every command fails for a file whose name is no UTF-8, as a folder of images may hold.
CHILD = """
from fedcore.compute_worker import serve
from fedcore.errors import DataError

NAME = b"gr\\xfc\\xdfe.png".decode("utf-8", "surrogateescape")

def fail(args, job):
    raise DataError(f"/data/{NAME}: can't be read" + "!" * 5000, hint=f"mend {NAME}")

def train(args, job):
    from pathlib import Path
    from fedcore.tensor_file import TensorSpec, write_tensor_file
    made = Path(args["state"]) / "trained"
    made.write_text(made.read_text() + "x" if made.exists() else "x")
    spec = TensorSpec("w", "I64", (2,))
    return {"digest": write_tensor_file(Path(args["out"]), {"w": (spec, bytes(16))}), "report": {"num_examples": 3}}

if __name__ == "__main__":
    serve({"describe": fail, "evaluate": fail, "recalibrate": fail, "train": train})
"""


class Site:
    """A site whose transfers are its own store: whatever is asked for is there."""

    def __init__(self, root: Path, host: ComputeHost) -> None:
        self.home = AgentHome(root)
        self.store = ArtifactStore(self.home.artifacts)
        spec = TensorSpec("w", "I64", (1,))
        path = self.store.new_path()
        self.model = write_tensor_file(path, {"w": (spec, bytes(8))})
        self.store.adopt(path, self.model)
        self.said: list[federation_pb2.AgentMessage] = []
        self.audit_file = open_site_audit(self.home.audit)
        self.audit = SiteAudit(self.audit_file)
        self.transfers = Transfers("a", self.store, self._no_stub, audit=self.audit)
        self.start(host)

    def start(self, host: ComputeHost, policy: SitePolicy | None = None) -> None:
        """The tasks of an agent that starts, under a policy."""
        self.tasks = Tasks(
            "a", self.home, AgentConfig(), host, self.store, self.transfers, self.said.append, policy,
            audit=self.audit,
        )  # fmt: skip

    def _no_stub(self) -> Any:
        raise UnreachableError("no connection")

    def train(self, run: str) -> federation_pb2.TrainTask:
        model = tensor_pb2.ArtifactRef(digest=self.model, payload_bytes=8)
        return federation_pb2.TrainTask(
            run=run, round=1, model=model, plan_json="{}", objective_options_json="{}"
        )

    def evaluate(self, run: str) -> federation_pb2.EvaluateTask:
        model = tensor_pb2.ArtifactRef(digest=self.model, payload_bytes=8)
        return federation_pb2.EvaluateTask(run=run, round=1, model=model, plan_json="{}")

    def recalibrate(self, run: str) -> federation_pb2.RecalibrateTask:
        model = tensor_pb2.ArtifactRef(digest=self.model, payload_bytes=8)
        return federation_pb2.RecalibrateTask(run=run, round=1, model=model, plan_json="{}")

    def delivers(
        self, deliver: Callable[..., Coroutine[Any, Any, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(self.transfers, "deliver", deliver)

    def failures(self) -> list[federation_pb2.TaskFailed]:
        return [m.failed for m in self.said if m.WhichOneof("message") == "failed"]


@pytest.fixture
def host(tmp_path: Path) -> ComputeHost:
    (tmp_path / "agent_child.py").write_text(textwrap.dedent(CHILD))
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return ComputeHost("agent_child", environment={"PYTHONPATH": path})


@pytest.fixture
def site(tmp_path: Path, host: ComputeHost) -> Iterator[Site]:
    made = Site(tmp_path / "site", host)
    yield made
    made.audit_file.close()


def go(host: ComputeHost, story: Coroutine[Any, Any, None]) -> None:
    async def closed() -> None:
        try:
            await asyncio.wait_for(story, 20)
        finally:
            await host.close()

    asyncio.run(closed())


async def stored(*args: Any) -> Any:
    return federation_pb2.DeliverReply.OUTCOME_STORED


def test_names_that_are_no_utf8_reach_the_coordinator_written_out(
    site: Site, host: ComputeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.delivers(stored, monkeypatch)

    async def story() -> None:
        reason = (await site.tasks.describe()).unavailable_reason
        assert reason.startswith(r"/data/gr\udcfc\udcdfe.png: can't be read!")
        assert len(reason) == 1000
        await site.tasks.train(site.train("blood-1"))
        await site.tasks.evaluate(site.evaluate("blood-1"))
        await site.tasks.recalibrate(site.recalibrate("blood-1"))

    go(host, story())
    assert [(failed.evaluating, failed.recalibrating) for failed in site.failures()] == [
        (True, False),
        (False, True),
    ]
    for failed in site.failures():
        assert failed.reason.startswith(r"/data/gr\udcfc\udcdfe.png")
        assert len(failed.reason) == 2000
        assert federation_pb2.TaskFailed.FromString(failed.SerializeToString()) == failed
    assert not list((site.home.artifacts / "tmp").iterdir())


def test_what_other_runs_left_goes_when_the_next_begins(
    site: Site, host: ComputeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, records = site.home.local_state, site.home.tasks
    site.delivers(stored, monkeypatch)

    async def story() -> None:
        await site.tasks.train(site.train("blood-1"))
        (records / "blood-1~2.json").write_text("{}")
        (local / "lost+found").mkdir()
        (records / "notes.txt").write_text("an engineer's own")
        await site.tasks.evaluate(site.evaluate("blood-1"))
        assert (local / "blood-1" / "trained").exists()
        assert (records / "blood-1~2.json").exists()
        await site.tasks.train(site.train("blood-2"))

    go(host, story())
    assert {path.name for path in local.iterdir()} == {"blood-2", "lost+found"}
    assert {path.name for path in records.iterdir()} == {"notes.txt"}
    assert (local / "blood-2" / "trained").exists()


def test_an_update_whose_answer_never_came_goes_with_what_is_asked_next(
    site: Site, host: ComputeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator asks for the evaluation as soon as the last update is there, perhaps before it answers that."""

    async def silent(*args: Any) -> Any:
        await asyncio.Event().wait()

    async def story() -> None:
        record, kept = site.home.tasks / "blood-1~1.json", site.home.tasks / "blood-1~2.json"
        delivering = asyncio.create_task(site.tasks.train(site.train("blood-1")))
        while not record.exists():
            await asyncio.sleep(0.01)
        update = (load_record(record) or {})["digest"]
        delivering.cancel()
        await asyncio.gather(delivering, return_exceptions=True)
        assert update in site.store, "it would be offered again"
        kept.write_text("{}")
        await site.tasks.evaluate(site.evaluate("blood-1"))
        assert not record.exists()
        assert update not in site.store
        assert site.model in site.store
        assert kept.exists(), "a later round's"

    site.delivers(silent, monkeypatch)
    go(host, story())


def test_a_task_that_failed_leaves_no_half_fetched_file(site: Site, host: ComputeHost) -> None:
    partial = site.home.artifacts / "partial" / f"{'0' * 64}.part"
    partial.write_bytes(b"what came before the disk was full")
    go(host, site.tasks.evaluate(site.evaluate("blood-1")))
    assert site.failures()
    assert not partial.exists()


def test_a_full_disk_of_ones_own_trains_again_and_then_tells(
    site: Site, host: ComputeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def damaged(*args: Any) -> Any:
        raise StorageError("update: not a canonical safetensors file")

    site.delivers(damaged, monkeypatch)
    go(host, site.tasks.train(site.train("blood-1")))
    assert (site.home.local_state / "blood-1" / "trained").read_text() == "xx"
    assert [failed.reason for failed in site.failures()] == ["update: not a canonical safetensors file"]
    assert load_record(site.home.tasks / "blood-1~1.json") is None


def test_a_finished_update_answers_for_the_inputs_that_it_was_made_from_only(
    site: Site, host: ComputeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator restored from a backup may ask for the same round of the same run, from another model."""

    async def away(*args: Any) -> Any:
        raise UnreachableError("the coordinator went away, with its disk")

    async def story() -> None:
        trained, record = site.home.local_state / "blood-1" / "trained", site.home.tasks / "blood-1~1.json"
        task = site.train("blood-1")
        await site.tasks._train_and_deliver(task)
        assert trained.read_text() == "x"
        site.delivers(away, monkeypatch)
        for times in ("xx", "xx"):  # the second time it is answered from the disk
            with pytest.raises(UnreachableError):
                await site.tasks._train_and_deliver(task)
            assert trained.read_text() == times
        spec, path = TensorSpec("w", "I64", (1,)), site.store.new_path()
        task.model.digest = write_tensor_file(path, {"w": (spec, bytes([1] * 8))})
        site.store.adopt(path, task.model.digest)
        with pytest.raises(UnreachableError):
            await site.tasks._train_and_deliver(task)
        assert trained.read_text() == "xxx"
        assert (load_record(record) or {})["inputs"] == f"{task.model.digest},,"

    site.delivers(stored, monkeypatch)
    go(host, story())


@pytest.mark.parametrize("run", ["blood-1a2b3c4d", "7", "a.b_c-d", "a" * 72])
def test_what_the_coordinator_calls_its_runs_is_accepted(run: str) -> None:
    assert is_run(run)


HOSTILE = ["", "..", ".", "../../etc", "/etc", "a/b", "a\\b", "A", "a~1", "a\n", "-a", "a" * 81, "\u0661"]


class Coordinator:
    """What the driver is told and what it answers, without a connection between."""

    def __init__(self, tasks: Any) -> None:
        def refuse() -> Any:
            raise UnreachableError("no coordinator here")

        self.driver = AgentDriver(
            "a", refuse, 60.0, 1, audit=cast(Any, None), purging=cast(Any, None)
        )  # it never connects
        self.driver._tasks = tasks

    def failures(self) -> list[federation_pb2.TaskFailed]:
        found = []
        while not self.driver._outbox.empty():
            message = self.driver._outbox.get_nowait()
            if message.WhichOneof("message") == "failed":
                found.append(message.failed)
        return found


class Buggy:
    """Tasks with a bug that no error of ours stands for."""

    def __init__(self) -> None:
        self.begun = 0

    async def train(self, task: Any) -> None:
        self.begun += 1
        raise KeyError("a secret of the site")

    async def recalibrate(self, task: Any) -> None:
        await self.train(task)

    async def evaluate(self, task: Any) -> None:
        await self.train(task)


@pytest.mark.parametrize("kind", ["train", "recalibrate", "evaluate"])
def test_a_bug_ends_the_task_once_and_is_told_without_its_text(kind: str) -> None:
    async def story() -> None:
        tasks = Buggy()
        told = Coordinator(tasks)
        task = {"run": "blood-1", "round": 3}
        directive = federation_pb2.Directive(**{kind: task})
        for times in (1, 2):
            told.driver._obey(directive)
            for _ in range(20):
                await asyncio.sleep(0)
            assert tasks.begun == times, "begins only when it is asked for"
            (failed,) = told.failures()
            assert (failed.run, failed.round) == ("blood-1", 3)
            assert (failed.recalibrating, failed.evaluating) == (kind == "recalibrate", kind == "evaluate")
            assert "KeyError" in failed.reason
            assert "secret" not in failed.reason

    asyncio.run(story())


@pytest.mark.parametrize("kind", ["train", "recalibrate", "evaluate"])
@pytest.mark.parametrize("run", HOSTILE)
def test_a_run_that_is_no_name_reaches_no_path(run: str, kind: str, site: Site, host: ComputeHost) -> None:
    before = sorted(site.home.root.rglob("*"))

    async def story() -> None:
        told = Coordinator(site.tasks)
        told.driver._obey(federation_pb2.Directive(**{kind: {"run": run, "round": 1}}))
        for _ in range(20):
            await asyncio.sleep(0)
        (failed,) = told.failures()
        assert failed.run == run
        assert (failed.recalibrating, failed.evaluating) == (kind == "recalibrate", kind == "evaluate")
        assert "not a run's name" in failed.reason

    go(host, story())
    assert sorted(site.home.root.rglob("*")) == before
    assert json.dumps(site.said) == "[]"


class Busy:
    """Tasks that last until they are withdrawn."""

    def __init__(self) -> None:
        self.running = 0
        self.released = 0

    async def describe(self) -> federation_pb2.Capabilities:
        return federation_pb2.Capabilities(models=["cnn"], num_examples=40)

    async def train(self, task: Any) -> None:
        self.running += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.running -= 1

    async def release(self) -> None:
        assert self.running == 0, "released while a task was in progress"
        self.released += 1


def test_a_pause_ends_the_task_at_once_is_told_and_holds_until_resume(tmp_path: Path) -> None:
    async def story() -> None:
        tasks, gate = Busy(), SiteGate(tmp_path / "paused", SitePolicy(min_images=40))
        told = Coordinator(tasks)
        told.driver._gate = gate
        told.driver._found = await tasks.describe()
        directive = federation_pb2.Directive(train=federation_pb2.TrainTask(run="blood-1", round=3))
        await told.driver._look_at_gate()
        told.driver._obey(directive)
        await asyncio.sleep(0.01)
        assert (tasks.running, told.driver._capabilities().unavailable_reason) == (1, "")

        pause(tmp_path / "paused", "scanner is down", datetime.now(UTC))
        await told.driver._look_at_gate()
        assert (tasks.running, tasks.released) == (0, 1)
        (failed,) = told.failures()
        assert (failed.run, failed.round, failed.evaluating) == ("blood-1", 3, False)
        assert failed.reason.endswith("scanner is down")
        assert told.driver._capabilities().unavailable_reason == failed.reason
        told.driver._obey(directive)
        await asyncio.sleep(0.01)
        assert tasks.running == 0
        assert [again.reason for again in told.failures()] == [failed.reason]

        resume(tmp_path / "paused")
        await told.driver._look_at_gate()
        assert told.driver._capabilities().unavailable_reason == ""
        assert told.driver._capabilities().models == ["cnn"]
        told.driver._obey(directive)
        await asyncio.sleep(0.01)
        assert tasks.running == 1
        told.driver._step(*stopped(told.driver._state, ""))
        await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(story(), 120))


def test_what_the_policy_forbids_touches_neither_line_nor_disk(site: Site, host: ComputeHost) -> None:
    policy = SitePolicy(objectives=("plain",), receive_impressions=False)
    site.start(host, policy)
    task = site.train("blood-1")
    task.objective = "proximal"
    before = sorted(site.home.root.rglob("*"))
    go(host, site.tasks.train(task))
    task.objective = "plain"
    task.impressions.digest = "0" * 64
    go(host, site.tasks.train(task))
    assert [failed.reason for failed in site.failures()] == [
        "refuses: policy forbids objective 'proximal' (allowed: plain)",
        "refuses: policy forbids to receive impressions",
    ]
    assert sorted(site.home.root.rglob("*")) == before
    assert host.pid is None, "no compute process was started for it"


def test_a_computation_beyond_the_hours_is_withdrawn_and_told(
    site: Site, host: ComputeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []

    async def endless(*args: Any) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(args[0])

    monkeypatch.setattr(host, "run", endless)
    policy = SitePolicy(max_hours_per_round=0.05 / 3600)
    site.start(host, policy)
    go(host, site.tasks.train(site.train("blood-1")))
    go(host, site.tasks.evaluate(site.evaluate("blood-1")))
    assert ended == ["train", "evaluate"]
    assert len(site.failures()) == 2
    assert all("hours a round, and they are over" in failed.reason for failed in site.failures())
