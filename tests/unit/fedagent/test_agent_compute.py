"""The agent's compute process as it runs: a child, driven through its pipes."""

import asyncio
import json

import numpy as np
import pytest

from fedagent.compute import AgentCompute
from fedcore.compute_host import ComputeHost
from fedcore.compute_worker import Job
from fedcore.errors import ConfigError, DataError
from fedcore.models import build_model
from fedcore.models.base import norm_tensor_names
from fedcore.models.state_file import load_tensors, save_state
from fedcore.plan import Plan

COMPUTE = {"device": "cpu", "threads": 1}
PLAN = Plan(
    name="p", rounds=3, seed=4,
    model={"name": "cnn", "classes": 3, "input": (1, 8, 8)},
    training={"batch_size": 8},
)  # fmt: skip


@pytest.fixture
def site(tmp_path):
    """A folder with the site's npz and the global model; returns the arguments of `train`."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 30), ("val", 6), ("test", 9)):
        arrays[f"{split}_images"] = rng.integers(0, 255, (count, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 3, (count, 1), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", **arrays)
    save_state(tmp_path / "model", build_model(PLAN.model).state_dict())
    return {
        "data": {"kind": "npz", "path": str(tmp_path / "data.npz")},
        "compute": COMPUTE,
        "plan": PLAN.to_json(),
        "site": "site-a",
        "run": "r1",
        "round": 1,
        "model": str(tmp_path / "model"),
        "impressions": None,
        "strategy_state": None,
        "objective": "cross_entropy",
        "objective_options": {},
        "local_tensors": [],
        "personal_tensors": [],
        "check_impressions": True,
        "state": str(tmp_path / "state"),
        "out": str(tmp_path / "update"),
    }


def silent():
    return Job(1, lambda m: None)


def scoring(site, **changes):
    keys = ("data", "compute", "plan", "site", "run", "model", "local_tensors", "personal_tensors", "state")
    return {**{key: site[key] for key in keys}, "share_class_metrics": False, **changes}


def test_the_process_answers_its_commands(site, tmp_path):
    async def talk():
        host = ComputeHost("fedagent.compute")
        progress = []
        try:
            described = await host.run("describe", {"data": site["data"], "compute": COMPUTE})
            trained = await host.run("train", site, progress.append)
            scored = await host.run("evaluate", scoring(site, model=site["out"], share_class_metrics=True))
            with pytest.raises(DataError, match="no such file"):
                await host.run(
                    "describe", {"data": {"kind": "npz", "path": "/nowhere.npz"}, "compute": COMPUTE}
                )
        finally:
            await host.close()
        return described, trained, scored, progress

    described, trained, scored, progress = asyncio.run(talk())
    assert described["device"] == "cpu"
    assert described["threads"] == 1
    assert described["num_examples"] == 30
    assert described["class_names"] is None
    assert "cnn" in described["models"]
    assert "impressions" in described["objectives"]
    assert "npz" in described["datasets"]
    report = trained["report"]
    assert set(report) == {
        "num_examples", "num_steps", "train_loss", "num_impressions", "seconds", "threads", "device",
        "corrupt_images", "impression_check",
    }  # fmt: skip
    assert report["impression_check"] is None
    assert (report["num_examples"], report["num_steps"], report["device"]) == (30, 4, "cpu")
    assert trained["digest"] == save_state(tmp_path / "copy", load_tensors(tmp_path / "update"))
    assert progress[-1]["done"] == progress[-1]["total"] == 4
    assert [s["split"] for s in scored["splits"]] == ["validation", "test"]
    test = scored["splits"][1]
    assert test["num_examples"] == sum(test["class_totals"]) == 9
    assert test["num_correct"] == sum(test["class_correct"])


def test_class_counts_stay_at_the_site_unless_its_policy_shares_them(site):
    for split in AgentCompute().evaluate(scoring(site), silent())["splits"]:
        assert list(split["class_totals"]) == []
        assert list(split["class_correct"]) == []


def test_results_are_json(site):
    compute = AgentCompute()
    json.dumps([compute.train(site, silent()), compute.evaluate(scoring(site), silent())])


def test_images_are_read_once_for_a_plan(site, tmp_path):
    compute = AgentCompute()
    first = compute.train(site, silent())["digest"]
    (tmp_path / "data.npz").unlink()
    assert compute.train(site, silent())["digest"] == first
    compute.evaluate(scoring(site), silent())
    other = PLAN.model_copy(update={"model": PLAN.model.model_copy(update={"input": (1, 16, 16)})})
    with pytest.raises(DataError, match="no such file"):
        compute.train({**site, "plan": other.to_json()}, silent())


def test_tensors_kept_at_the_site_are_used_in_its_evaluation(site, tmp_path):
    local = norm_tensor_names(build_model(PLAN.model))
    compute = AgentCompute()
    compute.train({**site, "local_tensors": local}, silent())
    update = load_tensors(tmp_path / "update")
    assert not set(update) & set(local)
    whole = load_tensors(tmp_path / "model") | update
    save_state(tmp_path / "next", whole)
    ours = compute.evaluate(scoring(site, model=str(tmp_path / "next"), local_tensors=local), silent())
    kept = next((tmp_path / "state").glob("*.safetensors"))
    save_state(tmp_path / "assembled", whole | load_tensors(kept))
    assembled = compute.evaluate(scoring(site, model=str(tmp_path / "assembled")), silent())
    without = compute.evaluate(scoring(site, model=str(tmp_path / "next")), silent())
    assert ours["splits"] == assembled["splits"]
    assert ours["splits"] != without["splits"]


def test_personal_tensors_are_used_in_the_evaluation_of_the_site(site, tmp_path):
    personal = norm_tensor_names(build_model(PLAN.model))
    compute = AgentCompute()
    compute.train({**site, "personal_tensors": personal}, silent())
    own = load_tensors(tmp_path / "update")
    first = load_tensors(tmp_path / "model")
    assert set(own) == set(first)
    save_state(tmp_path / "assembled", first | {name: own[name] for name in personal})
    ours = compute.evaluate(scoring(site, personal_tensors=personal), silent())
    assembled = compute.evaluate(scoring(site, model=str(tmp_path / "assembled")), silent())
    assert ours["splits"] == assembled["splits"] != compute.evaluate(scoring(site), silent())["splits"]


def test_noop_needs_no_data(site, tmp_path):
    plan = PLAN.model_copy(
        update={"model": PLAN.model.model_copy(update={"name": "noop", "options": {"params": 99}})}
    )
    save_state(tmp_path / "model", build_model(plan.model).state_dict())
    args = {**site, "plan": plan.to_json(), "data": {"kind": "npz", "path": "/nowhere.npz"}}
    compute = AgentCompute()
    assert compute.train(args, silent())["report"]["num_examples"] == 1
    assert compute.evaluate(scoring(args), silent())["splits"] == []


def test_an_unknown_dataset_kind_is_a_config_error():
    with pytest.raises(ConfigError, match="dicom"):
        AgentCompute().describe({"data": {"kind": "dicom"}, "compute": COMPUTE}, silent())
