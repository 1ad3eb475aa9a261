"""The coordinator's compute process as it runs: a child, driven through its pipes."""

import asyncio
import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fedcore.compute_host import ComputeHost
from fedcore.compute_worker import Job
from fedcore.errors import ConfigError, DataError, PlanError
from fedcore.models.state_file import load_tensors, save_state
from fedcore.plan import Plan
from fedcore.tensor_file import TensorSpec
from fedserver.compute import ServerCompute
from fedserver.synthesis.bank import Bank

COMPUTE = {"device": "cpu", "threads": 1}


def plan_for(strategy="fedimpres", seed=4, name="cnn", **options):
    return Plan(
        name="p",
        rounds=3,
        seed=seed,
        strategy=strategy,
        strategy_options=options,
        model={"name": name, "classes": 3, "input": (1, 8, 8)},
        synthesis={"images": 6},
    )


def command(plan, **args):
    return {"plan": plan.to_json(), "compute": COMPUTE, **args}


def aggregation(plan, folder, updates, *, round_number=1, state=None, released=None, num_sites=2):
    return command(
        plan, round=round_number, num_sites=num_sites, model=str(folder / "model"), updates=updates,
        out=str(folder / "merged"), state=state, state_out=str(folder / "state"), released=released,
        released_out=str(folder / "released"), registered_examples={},
    )  # fmt: skip


def silent():
    return Job(1, lambda m: None)


def initialise(folder, plan, name="model", initial=None):
    args = command(plan, initial=None if initial is None else str(initial), out=str(folder / name))
    return ServerCompute().initialise(args, silent())


def stored(path, site, num_examples):
    """An update as the coordinator has stored it."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"site": site, "path": str(path), "digest": digest, "report": {"num_examples": num_examples}}


def write_update(folder, site, *, add=0.0, num_examples=10):
    state = load_tensors(folder / "model")
    save_state(folder / site, {n: t + add if t.is_floating_point() else t for n, t in state.items()})
    return stored(folder / site, site, num_examples)


def test_the_process_answers_its_commands(tmp_path):
    plan = plan_for(steps=2, gate=False)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (12, 8, 8), dtype=np.uint8), np.arange(12) % 3
    np.savez(
        tmp_path / "test.npz",
        train_images=images,
        train_labels=labels,
        test_images=images,
        test_labels=labels,
    )

    async def talk():
        host = ComputeHost("fedserver.compute")
        model = str(tmp_path / "model")
        try:
            first = await host.run("initialise", command(plan, initial=None, out=model))
            updates = [write_update(tmp_path, "a", add=1.0), write_update(tmp_path, "b", num_examples=30)]
            merged = await host.run("aggregate", aggregation(plan, tmp_path, updates))
            made = await host.run(
                "synthesise", command(plan, round=2, model=model, previous=None, out=str(tmp_path / "bank"))
            )
            scored = await host.run("evaluate", command(plan, model=model, data=str(tmp_path / "test.npz")))
            with pytest.raises(PlanError, match="'fedsgd' is unknown"):
                await host.run("initialise", command(plan_for("fedsgd"), initial=None, out=model))
        finally:
            await host.close()
        return first, merged, made, scored

    first, merged, made, scored = asyncio.run(talk())
    assert set(first) == {
        "digest", "update_tensors", "local_tensors", "personal_tensors", "objective", "objective_options", "shares_state",
        "synthesises_once", "overlaps", "statistic_tensors",
    }  # fmt: skip
    assert not first["shares_state"]
    assert merged["state_digest"] is None
    assert merged["released_digest"] is None
    assert ["conv1.weight", "F32", [32, 1, 3, 3]] in first["update_tensors"]
    assert first["local_tensors"] == []
    assert first["objective"] == "impressions"
    assert merged["accepted"] == ["a", "b"]
    assert merged["rejected"] == {}
    start, end = load_tensors(tmp_path / "model"), load_tensors(tmp_path / "merged")
    assert torch.allclose(end["conv1.weight"], start["conv1.weight"] + 0.25, atol=1e-6)
    assert made["made"] == 6
    assert made["note"] == ""
    assert len(Bank.load(tmp_path / "bank")) == 6
    (test,) = scored["splits"]
    assert test["split"] == "test"
    assert test["class_totals"] == [4, 4, 4]


def test_the_first_model_follows_from_the_plans_seed_alone(tmp_path):
    digest = initialise(tmp_path, plan_for())["digest"]
    torch.rand(3)
    assert initialise(tmp_path, plan_for())["digest"] == digest
    assert initialise(tmp_path, plan_for(seed=5))["digest"] != digest


def test_fedbn_leaves_normalisation_out_of_updates_and_of_the_merge(tmp_path):
    plan = plan_for("fedbn")
    first = initialise(tmp_path, plan)
    local = set(first["local_tensors"])
    names = {name for name, _, _ in first["update_tensors"]}
    assert "norm1.running_var" in local
    assert "conv1.weight" in names
    assert not names & local
    state = load_tensors(tmp_path / "model")
    save_state(tmp_path / "a", {n: state[n] + 1 for n in names})
    updates = [stored(tmp_path / "a", "a", 1)]
    args = aggregation(plan, tmp_path, updates)
    assert ServerCompute().aggregate(args, silent())["accepted"] == ["a"]
    merged = load_tensors(tmp_path / "merged")
    assert all(torch.equal(merged[n], state[n]) for n in local)
    assert all(torch.equal(merged[n], state[n] + 1) for n in names)


def test_a_strategys_extras_and_state_pass_through(tmp_path):
    plan = plan_for("scaffold")
    first = initialise(tmp_path, plan)
    assert first["shares_state"]
    extras = [spec for spec in first["update_tensors"] if spec[0].startswith("aux/variate/")]
    assert ["aux/variate/head.bias", "F32", [3]] in extras
    assert not [name for name, _, _ in extras if "running" in name]
    state = load_tensors(tmp_path / "model")
    save_state(tmp_path / "a", {**state, **{name: torch.ones(shape) for name, _, shape in extras}})
    updates = [stored(tmp_path / "a", "a", 1)]
    result = ServerCompute().aggregate(aggregation(plan, tmp_path, updates), silent())
    # One of two sites moved its variate by one.
    variates = load_tensors(tmp_path / "state")
    assert {f"aux/{name}" for name in variates} == {name for name, _, _ in extras}
    assert all(bool((tensor == 0.5).all()) for tensor in variates.values())
    assert result["state_digest"] == save_state(tmp_path / "check", variates)


def test_the_released_model_is_the_average_over_rounds(tmp_path):
    plan = plan_for("fedavg", ema=0.5)
    initialise(tmp_path, plan)
    bias = load_tensors(tmp_path / "model")["head.bias"].clone()
    compute = ServerCompute()
    first = compute.aggregate(aggregation(plan, tmp_path, [write_update(tmp_path, "a", add=1.0)]), silent())
    assert first["released_digest"] is None
    (tmp_path / "merged").replace(tmp_path / "released-1")
    args = aggregation(
        plan,
        tmp_path,
        [write_update(tmp_path, "b", add=4.0)],
        round_number=2,
        released=str(tmp_path / "released-1"),
    )
    second = compute.aggregate(args, silent())
    released = load_tensors(tmp_path / "released")
    assert second["released_digest"] == save_state(tmp_path / "check", released)
    # Weights 0.5 and 1, together one: 1/3 and 2/3.
    assert torch.allclose(released["head.bias"], bias + 3.0)
    assert torch.allclose(load_tensors(tmp_path / "merged")["head.bias"], bias + 4.0)


def test_extras_of_a_plug_in_need_the_prefix(tmp_path, monkeypatch):
    wrong = [TensorSpec("variate", "F32", (1,))]
    monkeypatch.setattr("fedserver.strategies.fedavg.FedAvg.update_extras", lambda *_: wrong)
    with pytest.raises(ConfigError, match=r"'fedavg': update_extras names 'variate', expected 'aux/"):
        initialise(tmp_path, plan_for("fedavg"))


def test_an_operators_model_of_any_writer_becomes_the_first(tmp_path):
    initialise(tmp_path, plan_for(), "other")
    state = {n: t + 1 for n, t in load_tensors(tmp_path / "other").items()}
    save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    initialise(tmp_path, plan_for(), "model", tmp_path / "theirs.safetensors")
    assert torch.equal(load_tensors(tmp_path / "model")["head.bias"], state["head.bias"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("head.bias"), "'head.bias' is missing"),
        (lambda s: s["head.bias"].fill_(torch.nan), "'head.bias' holds NaN"),
        (lambda s: s.update({"head.bias": torch.zeros(4)}), "shape"),
    ],
)
def test_an_initial_model_that_does_not_suit_is_a_plan_error(tmp_path, change, message):
    initialise(tmp_path, plan_for(), "other")
    state = load_tensors(tmp_path / "other")
    change(state)
    save_state(tmp_path / "theirs", state)
    with pytest.raises(PlanError, match=message):
        initialise(tmp_path, plan_for(), "model", tmp_path / "theirs")


def test_a_round_without_a_sound_update_says_why(tmp_path):
    plan = plan_for()
    initialise(tmp_path, plan)
    updates = [write_update(tmp_path, "a", add=float("nan")), write_update(tmp_path, "b", num_examples=0)]
    args = aggregation(plan, tmp_path, updates, round_number=3)
    found = ServerCompute().aggregate(args, silent())
    assert found["digest"] is None
    assert found["reason"].startswith("only 0 updates passed the gate, min_sites is 1: a round 3: tensor")
    assert {site: verdict["passed"] for site, verdict in found["verdicts"].items()} == {
        "a": False,
        "b": False,
    }
    assert "NaN" in found["rejected"]["a"]


def test_a_strategy_without_impressions_makes_none(tmp_path):
    initialise(tmp_path, plan_for())
    args = command(
        plan_for("fedavg"), round=2, model=str(tmp_path / "model"), previous=None, out=str(tmp_path / "b")
    )
    with pytest.raises(PlanError, match="'fedavg' makes no impressions"):
        ServerCompute().synthesise(args, silent())


def test_a_missing_test_set_is_named(tmp_path):
    initialise(tmp_path, plan_for())
    args = command(plan_for(), model=str(tmp_path / "model"), data=str(tmp_path / "gone.npz"))
    with pytest.raises(DataError, match=r"evaluation.data: .*gone.npz"):
        ServerCompute().evaluate(args, silent())
