"""What a coordinator may have a site measure: one model in the round of its last update, and the same answer again."""

import asyncio
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from fedagent.policy import SitePolicy
from fedagent.recalibration_limit import RecalibrationLimit
from fedcore.audit_text import document
from fedcore.errors import PermissionDeniedError, UnreachableError
from fedcore.tensor_file import TensorSpec, write_tensor_file
from fedcore.v1 import federation_pb2
from tests.unit.fedagent.test_driver_and_tasks import Site, stored

RUN = "blood-1"


class Measures:
    """Stands for the compute process: trains, and finds other statistics each time that it measures."""

    def __init__(self) -> None:
        self.measured = 0
        self.damaged = False

    async def run(self, command: str, args: dict[str, Any], forward: Any) -> dict[str, Any]:
        assert command in ("train", "recalibrate")
        if command == "recalibrate":
            self.measured += 1
            if self.damaged:
                raise UnreachableError("its process died")
        tensor = (TensorSpec("bn.running_mean", "F32", (1,)), struct.pack("<f", self.measured))
        digest = write_tensor_file(Path(args["out"]), {"bn.running_mean": tensor})
        return {"digest": digest, "report": {"num_examples": 3}, "num_examples": 3, "seconds": 0.5}


class Story:
    """A site whose agent may be started again, and a coordinator that asks it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compute = Measures()
        self.site = Site(root, cast(Any, self.compute))
        self.site.delivers(stored, monkeypatch)
        self.model, self.other = self.fetched(0), self.fetched(7)

    def fetched(self, value: int) -> str:
        """A model that lies here, as if it had been fetched."""
        path = self.site.store.new_path()
        digest = write_tensor_file(path, {"w": (TensorSpec("w", "I64", (1,)), bytes([value] * 8))})
        self.site.store.adopt(path, digest)
        return digest

    def restart(self, policy: SitePolicy | None = None) -> None:
        self.site.start(cast(Any, self.compute), policy)

    def update(self, round_number: int, model: str = "") -> None:
        """The site trains and delivers."""
        task = self.site.train(RUN)
        task.round, task.model.digest = round_number, model or self.model
        asyncio.run(asyncio.wait_for(self.site.tasks.train(task), 20))
        self.fetched(0), self.fetched(7)  # what a training does not need is deleted
        assert not self.said(), "an update is no message"

    def ask(self, round_number: int, model: str) -> federation_pb2.AgentMessage:
        """What the site says when it is asked for statistics."""
        task = self.site.recalibrate(RUN)
        task.round, task.model.digest = round_number, model
        asyncio.run(asyncio.wait_for(self.site.tasks.recalibrate(task), 20))
        (message,) = (m for m in self.said() if m.WhichOneof("message") != "progress")
        return message

    def refused(self, round_number: int, model: str) -> str:
        message = self.ask(round_number, model)
        assert message.failed.recalibrating, message
        return message.failed.reason

    def said(self) -> list[federation_pb2.AgentMessage]:
        said = list(self.site.said)
        self.site.said.clear()
        return said

    def audited(self) -> list[dict[str, Any]]:
        found = [document(entry) for entry in self.site.audit.log.walk()]
        return [record for record in found if record["action"] == "statistics.refuse"]


@pytest.fixture
def story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Story]:
    made = Story(tmp_path / "site", monkeypatch)
    yield made
    made.site.audit_file.close()


def test_the_same_question_has_the_same_answer_and_another_one_none(story: Story) -> None:
    story.update(3)
    first = story.ask(3, story.model)
    assert first.statistics.num_examples == 3
    assert story.ask(3, story.model) == first
    story.restart()
    assert story.ask(3, story.model) == first
    assert story.compute.measured == 1, "answered from the disk"
    reason = story.refused(3, story.other)
    assert reason.startswith(
        f"refuses: run {RUN} round 3: statistics of model {story.model[:12]} were given, and one model is measured a "
        f"round; asked for '{story.other[:12]}'"
    )
    assert story.refused(3, story.other) == reason
    assert story.ask(3, story.model) == first, "what was refused changes nothing"
    (record,) = story.audited()
    assert (record["result"], record["object"]) == ("permission_denied", f"artifact/{story.other}")
    assert record["detail"]["run"] == RUN
    assert record["detail"]["error"] in reason


def test_only_the_round_of_the_last_update_may_be_asked_for(story: Story) -> None:
    assert "none was sent" in story.refused(1, story.model)
    story.update(3)
    for other in (2, 4):
        assert "the last one sent is of round 3" in story.refused(other, story.model)
    assert story.compute.measured == 0
    assert len(story.audited()) == 3
    assert story.ask(3, story.model).statistics.round == 3
    story.update(4)
    assert "of round 4" in story.refused(3, story.model)
    assert story.ask(4, story.other).statistics.model == story.other, "each update may be followed by a model"


def test_training_the_round_again_opens_it_for_another_model_only_from_other_inputs(story: Story) -> None:
    story.update(3)
    first = story.ask(3, story.model)
    story.update(3)
    assert "one model is measured a round" in story.refused(3, story.other)
    assert story.ask(3, story.model) == first
    story.update(3, model=story.other)  # a coordinator restored from a backup has another model to start from
    assert story.ask(3, story.other).statistics.model == story.other


def test_what_was_never_told_counts_for_nothing(story: Story) -> None:
    story.update(3)
    story.compute.damaged = True
    assert "its process died" in story.refused(3, story.model)
    story.compute.damaged = False
    assert story.ask(3, story.other).statistics.model == story.other


def test_what_can_not_be_kept_is_not_sent(story: Story) -> None:
    story.update(3)
    in_the_way = story.site.home.local_state / RUN / "statistics.message"
    in_the_way.mkdir()
    assert "Is a directory" in story.refused(3, story.model)
    in_the_way.rmdir()
    assert story.ask(3, story.model).statistics.model == story.model


def test_an_answer_damaged_on_the_disk_is_measured_anew_of_the_same_model(story: Story) -> None:
    story.update(3)
    story.ask(3, story.model)
    answer = story.site.home.local_state / RUN / "statistics.message"
    answer.write_bytes(answer.read_bytes()[:-1] + b"!")
    assert story.ask(3, story.model).statistics.num_examples == 3
    assert story.compute.measured == 2
    assert "one model is measured" in story.refused(3, story.other)


def test_a_policy_that_forbids_it_is_said_before_anything_is_done(story: Story) -> None:
    story.update(3)
    story.restart(SitePolicy(recalibrate=False))
    reason = "refuses: policy forbids to measure BatchNorm statistics of merged models"
    assert story.refused(3, story.model) == reason
    assert story.compute.measured == 0


def test_an_answer_that_comes_after_the_next_update_is_not_kept(tmp_path: Path) -> None:
    """A task that was withdrawn may end late."""
    limit = RecalibrationLimit(tmp_path)
    limit.update_leaves(RUN, 3, "m")
    limit.update_leaves(RUN, 4, "n")
    with pytest.raises(PermissionDeniedError, match="the last one sent is of round 4"):
        limit.answered(federation_pb2.StatisticsReport(run=RUN, round=3, model="a"))
    assert limit.answer(RUN, 4, "b") is None
