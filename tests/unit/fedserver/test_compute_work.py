"""Compute commands whose disk or whose inputs fail."""

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from fedcore.artifact_store import ArtifactStore
from fedcore.clock import ManualClock
from fedcore.compute_host import ComputeHost
from fedcore.compute_worker import Job
from fedcore.errors import DiskError
from fedcore.plan import validate_plan
from fedcore.tensor_file import TensorSpec, write_tensor_file
from fedserver import round_events as ev
from fedserver.compute import ServerCompute
from fedserver.compute_work import ComputeCommand, ComputeWork
from fedserver.recalibration import PoolStatistics
from fedserver.round_state import RunState
from fedserver.round_work import Aggregate

PLAN = validate_plan(
    {
        "name": "t", "rounds": 1, "strategy": "fedavg", "sites": ["a", "b"],
        "model": {"name": "cnn", "classes": 3, "input": [1, 8, 8]},
    }
)  # fmt: skip
REPORT = ev.Report(num_examples=1, num_steps=1, train_loss=0.0, num_impressions=0, seconds=1.0)


class Host:
    """Answers every command alike."""

    def __init__(self, answer: Exception | dict[str, Any]) -> None:
        self.answer = answer
        self.asked = 0

    async def run(self, command: str, args: object, on_progress: object) -> dict[str, Any]:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Merging(Host):
    """Aggregates and pools as the compute process does."""

    def __init__(self) -> None:
        super().__init__({})

    async def run(self, command: str, args: Any, on_progress: object) -> dict[str, Any]:
        return ServerCompute().handlers()[command](dict(args), Job(1, lambda message: None))


def artifact(store: ArtifactStore, value: bytes) -> str:
    path = store.new_path()
    digest = write_tensor_file(path, {"w": (TensorSpec("w", "F32", (1,)), value * 4)})
    store.adopt(path, digest, durable=False)
    return digest


def aggregate(store: ArtifactStore, host: Host, *digests: str) -> ev.Event:
    updates = tuple((site, digest, REPORT) for site, digest in zip("ab", digests, strict=True))
    return perform(store, host, Aggregate(1, artifact(store, b"m"), updates))


def perform(store: ArtifactStore, host: Host, command: ComputeCommand) -> ev.Event:
    work = ComputeWork(cast(ComputeHost, host), store, ManualClock(1.0), {"device": "cpu", "threads": 1})
    state = RunState(run="r", plan=PLAN, sites=("a", "b"))
    return asyncio.run(work.perform(state, command, None, lambda fields: None))


def test_a_full_disk_is_no_failed_attempt(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    with pytest.raises(DiskError):
        aggregate(store, Host(DiskError("full")), artifact(store, b"a"), artifact(store, b"b"))


def test_the_sites_of_missing_updates_are_asked_again(tmp_path: Path) -> None:
    store, host = ArtifactStore(tmp_path), Host({})
    event = aggregate(store, host, artifact(store, b"a"), "0" * 64)
    assert isinstance(event, ev.AggregationFailed)
    assert event.rejected == {"b": "b round 1: its update is missing on the coordinator's disk"}
    assert host.asked == 0


def test_the_sites_of_damaged_updates_are_asked_again(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    damaged = artifact(store, b"b")
    path = store.path(damaged)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    event = aggregate(store, Merging(), artifact(store, b"a"), damaged)
    assert isinstance(event, ev.AggregationFailed)
    assert event.rejected == {"b": "b round 1: its update is damaged on the coordinator's disk"}


def test_the_sites_of_damaged_statistics_are_asked_again(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    statistics = tuple((site, artifact(store, site.encode()), REPORT) for site in "ab")
    store.path(statistics[1][1]).unlink()
    event = perform(store, Merging(), PoolStatistics(3, artifact(store, b"m"), statistics))
    assert isinstance(event, ev.StatisticsLost)
    reason = "b round 3: its statistics are missing or damaged on the coordinator's disk"
    assert (event.round, event.lost) == (3, {"b": reason})
