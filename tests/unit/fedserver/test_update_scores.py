"""What local training did, on models whose answers are known: a head's bias decides which class they name."""

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedcore.artifact_store import ArtifactStore
from fedcore.clock import SystemClock
from fedcore.compute_host import ComputeHost
from fedcore.compute_worker import Cancelled, Job
from fedcore.errors import DataError, StorageError
from fedcore.models.state_file import load_tensors, save_state
from fedcore.plan import Plan
from fedserver import round_events as ev
from fedserver.compute import ServerCompute
from fedserver.compute_work import ComputeWork
from fedserver.own_images import balanced_sample
from fedserver.round_state import RunState
from fedserver.round_work import Aggregate, ScoreUpdates

COMPUTE = {"device": "cpu", "threads": 1}
# Images of each class in the file.
TOTALS = (4, 5, 6)


def plan_for(data: Path | None, strategy: str = "fedavg", updates_images: int = 100) -> Plan:
    return Plan(
        name="p",
        rounds=3,
        strategy=strategy,
        model={"name": "cnn", "classes": 3, "input": (1, 8, 8)},
        evaluation={"updates_data": None if data is None else str(data), "updates_images": updates_images},
    )


def own_images(path: Path, split: str = "val") -> Path:
    labels = np.repeat(np.arange(3), TOTALS)
    images = np.random.default_rng(0).integers(0, 255, (len(labels), 8, 8), dtype=np.uint8)
    np.savez(path, allow_pickle=False, **{f"{split}_images": images, f"{split}_labels": labels})
    return path


def silent() -> Job:
    return Job(1, lambda message: None)


def first_model(folder: Path, plan: Plan) -> list[list[Any]]:
    args = {"plan": plan.to_json(), "compute": COMPUTE, "initial": None, "out": str(folder / "model")}
    tensors: list[list[Any]] = ServerCompute().initialise(args, silent())["update_tensors"]
    return tensors


def naming(folder: Path, name: str, label: int, **more: torch.Tensor) -> Path:
    """A model that calls every image `label`."""
    state = load_tensors(folder / "model")
    state["head.bias"] = torch.nn.functional.one_hot(torch.tensor(label), 3).float() * 1e6
    save_state(folder / name, {**state, **more})
    return folder / name


def score(folder: Path, plan: Plan, **updates: Path) -> dict[str, Any]:
    args = {
        "plan": plan.to_json(), "compute": COMPUTE, "model": str(folder / "start"),
        "updates": [{"site": site, "path": str(path)} for site, path in updates.items()],
        "data": str(folder / "own.npz"),
    }  # fmt: skip
    return ServerCompute().score_updates(args, silent())


def test_start_and_updates_are_scored_on_the_same_images(tmp_path: Path) -> None:
    plan = plan_for(own_images(tmp_path / "own.npz"))
    first_model(tmp_path, plan)
    naming(tmp_path, "start", 0)
    found = score(tmp_path, plan, a=naming(tmp_path, "a", 2), b=naming(tmp_path, "b", 0))
    assert found == {
        "class_totals": [4, 5, 6], "before": [4, 0, 0], "after": {"a": [0, 0, 6], "b": [4, 0, 0]}, "note": "",
    }  # fmt: skip


def test_few_images_are_shared_out_evenly_and_are_the_same_each_round(tmp_path: Path) -> None:
    plan = plan_for(own_images(tmp_path / "own.npz"), updates_images=7)
    first_model(tmp_path, plan)
    naming(tmp_path, "start", 0)
    found = score(tmp_path, plan, a=tmp_path / "model")
    assert sorted(found["class_totals"]) == [2, 2, 3]
    assert score(tmp_path, plan, a=tmp_path / "model") == found


def test_a_file_with_test_images_only_is_taken(tmp_path: Path) -> None:
    plan = plan_for(own_images(tmp_path / "own.npz", "test"))
    first_model(tmp_path, plan)
    naming(tmp_path, "start", 1)
    assert score(tmp_path, plan)["before"] == [0, 5, 0]


def test_what_an_update_carries_beside_the_model_is_left_aside(tmp_path: Path) -> None:
    plan = plan_for(own_images(tmp_path / "own.npz"), strategy="scaffold")
    extras = {n: torch.ones(shape) for n, _, shape in first_model(tmp_path, plan) if n.startswith("aux/")}
    assert extras
    naming(tmp_path, "start", 0)
    found = score(tmp_path, plan, a=naming(tmp_path, "a", 1, **extras))
    assert (found["after"], found["note"]) == ({"a": [0, 5, 0]}, "")


def test_a_damaged_update_costs_its_own_score_only(tmp_path: Path) -> None:
    plan = plan_for(own_images(tmp_path / "own.npz"))
    first_model(tmp_path, plan)
    naming(tmp_path, "start", 0)
    cut, other = naming(tmp_path, "cut", 1), naming(tmp_path, "other", 1)
    cut.write_bytes(cut.read_bytes()[:-10])
    save_state(other, {"head.bias": torch.zeros(3)})
    found = score(tmp_path, plan, cut=cut, fine=naming(tmp_path, "fine", 1), other=other)
    assert found["after"] == {"fine": [0, 5, 0]}
    assert "cut: update not scored: " in found["note"]
    assert "other: update not scored: other: does not hold the plan's model" in found["note"]
    (tmp_path / "start").write_bytes(b"?")
    with pytest.raises(StorageError):
        score(tmp_path, plan, fine=tmp_path / "fine")


def test_where_sites_keep_tensors_an_update_is_no_model(tmp_path: Path) -> None:
    plan = plan_for(own_images(tmp_path / "own.npz"), strategy="fedbn")
    first_model(tmp_path, plan)
    found = score(tmp_path, plan, a=tmp_path / "model")
    assert (found["after"], found["class_totals"]) == ({}, [])
    assert found["note"] == "updates not scored: strategy 'fedbn' gives each site 15 tensors of its own"


def test_where_sites_have_layers_of_their_own_none_starts_from_the_global_model(tmp_path: Path) -> None:
    plan = plan_for(own_images(tmp_path / "own.npz"), strategy="fedimpres")
    plan = plan.model_copy(update={"strategy_options": {"local_norm": True}})
    first_model(tmp_path, plan)
    found = score(tmp_path, plan, a=tmp_path / "model")
    assert (found["after"], found["class_totals"]) == ({}, [])
    assert "gives each site 15 tensors of its own" in found["note"]


def test_withdrawn_scoring_ends(tmp_path: Path) -> None:
    plan = plan_for(own_images(tmp_path / "own.npz"))
    first_model(tmp_path, plan)
    job = silent()
    job.cancel()
    args = {"plan": plan.to_json(), "compute": COMPUTE, "model": str(tmp_path / "model"), "updates": []}
    with pytest.raises(Cancelled):
        ServerCompute().score_updates({**args, "data": str(tmp_path / "own.npz")}, job)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, r"evaluation\.updates_data: .*own\.npz: can't be read"),
        (
            {"val_images": np.zeros((0, 8, 8), np.uint8), "val_labels": np.zeros(0, int)},
            "has no validation or",
        ),
        ({"train_images": np.zeros((1, 8, 8), np.uint8)}, "has no array 'test_labels'"),
    ],
)
def test_images_that_are_not_there_are_named(
    arrays: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    plan = plan_for(tmp_path / "own.npz")
    first_model(tmp_path, plan)
    if arrays is not None:
        np.savez(tmp_path / "own.npz", allow_pickle=False, **arrays)
    with pytest.raises(DataError, match=message):
        score(tmp_path, plan, a=tmp_path / "model")


@given(st.lists(st.integers(0, 4), max_size=60), st.integers(1, 70), st.integers(0, 9))
def test_a_sample_is_as_even_over_classes_as_they_allow(labels: list[int], most: int, seed: int) -> None:
    array = np.array(labels, dtype=np.int64)
    chosen = balanced_sample(array, most, seed)
    assert len(chosen) == min(most, len(labels)) == len(set(chosen.tolist()))
    assert chosen.tolist() == sorted(chosen.tolist())
    taken = {k: int((array[chosen] == k).sum()) for k in set(labels)}
    whole = {k: labels.count(k) for k in set(labels)}
    for k, count in taken.items():
        # A class that has images left has no fewer than any other, one aside.
        assert count == whole[k] or count >= max(taken.values()) - 1
    assert np.array_equal(chosen, balanced_sample(array, most, seed))


def test_from_merge_to_scores_through_a_compute_process(tmp_path: Path) -> None:
    """A refused update is not scored; images that are gone become a note, and nothing is raised."""
    own = own_images(tmp_path / "own.npz")
    plan = plan_for(own)
    first_model(tmp_path, plan)
    naming(tmp_path, "start", 0)
    state = load_tensors(tmp_path / "model")
    save_state(tmp_path / "bad", {**state, "head.bias": torch.full((3,), torch.nan)})
    good, bad = naming(tmp_path, "good", 1), tmp_path / "bad"
    store = ArtifactStore(tmp_path / "artifacts")

    def adopted(path: Path) -> str:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        store.adopt(path, digest, durable=False)
        return digest

    start, reports = adopted(tmp_path / "start"), ev.Report(num_examples=5)
    updates = tuple((site, adopted(path), reports) for site, path in (("bad", bad), ("good", good)))
    run = RunState(run="r", plan=plan, sites=("bad", "good"))

    async def talk() -> tuple[ev.Event, ev.Event, ev.Event]:
        host = ComputeHost("fedserver.compute")
        work = ComputeWork(host, store, SystemClock(), COMPUTE)
        try:
            merged = await work.perform(run, Aggregate(1, start, updates), None, lambda said: None)
            assert isinstance(merged, ev.AggregationFinished)
            digests = {site: digest for site, digest, _ in updates}
            command = ScoreUpdates(1, start, tuple((site, digests[site]) for site in merged.accepted))
            scored = await work.perform(run, command, None, lambda said: None)
            own.unlink()
            return merged, scored, await work.perform(run, command, None, lambda said: None)
        finally:
            await host.close()

    merged, scored, failed = asyncio.run(talk())
    assert isinstance(merged, ev.AggregationFinished)
    assert set(merged.rejected) == {"bad"}
    assert isinstance(scored, ev.UpdatesScored)
    assert (scored.class_totals, scored.before, scored.after) == (TOTALS, (4, 0, 0), {"good": (0, 5, 0)})
    assert isinstance(failed, ev.UpdatesScored)
    assert failed.note.startswith("updates not scored: evaluation.updates_data: ")
    assert failed.after == {}
