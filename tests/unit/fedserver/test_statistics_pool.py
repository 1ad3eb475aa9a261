"""Sites' BatchNorm statistics in one model: what pooling gives, what the gate refuses, which plans may ask for it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedcore.compute_worker import Job
from fedcore.errors import LearningError, PlanError, StorageError
from fedcore.models.state_file import load_tensors, save_state
from fedcore.plan import Plan, validate_plan
from fedcore.tensor_file import TensorSpec
from fedserver.compute import ServerCompute
from fedserver.statistics_pool import RecalibratedModel, pooled, recalibrate
from fedserver.strategies import load_strategy
from fedserver.strategies.base import SiteReport
from tests.unit.fedserver.test_server_compute import initialise, plan_for

MEAN, VARIANCE = "bn.running_mean", "bn.running_var"
MODEL = {
    "w": torch.tensor([3.0]),
    MEAN: torch.zeros(2),
    VARIANCE: torch.ones(2),
    "bn.num_batches_tracked": torch.tensor(9),
}


def plan(**changes: object) -> Plan:
    model = {"name": "cnn", "classes": 3, "input": [1, 8, 8]}
    return validate_plan(
        {"name": "p", "rounds": 2, "min_sites": 2, "strategy": "fedavg", "model": model, **changes}
    )


def of(values_NC: Tensor) -> dict[str, Tensor]:
    return {MEAN: values_NC.mean(0), VARIANCE: values_NC.var(0, correction=0)}


Measured = list[tuple[SiteReport, dict[str, Tensor]]]


def merged(measured: Measured, plan: Plan, number: int, out: Path) -> RecalibratedModel:
    return recalibrate(MODEL, measured, load_strategy(plan), plan, number, out)


def test_pooled_statistics_are_those_of_all_values_together():
    values_NC = torch.randn(50, 2, generator=torch.Generator().manual_seed(1)) * 3 + 40
    parts = [values_NC[:8], values_NC[8:20] + 10, values_NC[20:]]
    weights = [len(part) / 50 for part in parts]
    found, expected = pooled([of(part) for part in parts], weights), of(torch.cat(parts))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)
        assert found[name].dtype == torch.float32


def test_only_the_statistics_change_and_sites_weigh_as_in_the_merge(tmp_path):
    ones = torch.ones(2)
    measured = [
        (SiteReport("a", 30), {MEAN: 0 * ones, VARIANCE: ones}),
        (SiteReport("b", 10), {MEAN: 4 * ones, VARIANCE: 2 * ones}),
    ]
    found = merged(measured, plan(), 1, tmp_path / "out")
    assert not found.rejected
    tensors = load_tensors(tmp_path / "out")
    assert tensors[MEAN].tolist() == [1.0, 1.0]
    assert tensors[VARIANCE].tolist() == [1.25 + 3.0] * 2
    assert (tensors["w"].item(), tensors["bn.num_batches_tracked"].item()) == (3.0, 9)
    even = plan(strategy_options={"weighting": "uniform"})
    merged(measured, even, 1, tmp_path / "out")
    assert load_tensors(tmp_path / "out")[MEAN].tolist() == [2.0, 2.0]


def test_the_gate_leaves_out_what_is_out_of_all_proportion(tmp_path):
    ones = torch.ones(2)
    far = (("a", 1), ("b", 2), ("c", 1000))
    measured = [(SiteReport(site, 10), {MEAN: k * ones, VARIANCE: ones}) for site, k in far]
    found = merged(measured, plan(), 3, tmp_path / "out")
    assert list(found.rejected) == ["c"]
    assert "500.0 times the round's median" in found.rejected["c"]
    assert load_tensors(tmp_path / "out")[MEAN].tolist() == [1.5, 1.5]
    off = plan(gate={"check_norm": False})
    assert not merged(measured, off, 3, tmp_path / "out").rejected
    three = plan(min_sites=3)
    with pytest.raises(LearningError, match="2 statistics passed the gate, min_sites is 3: c round 3"):
        merged(measured, three, 3, tmp_path / "out")


SPECS = [TensorSpec(MEAN, "F32", (2,)), TensorSpec(VARIANCE, "F32", (2,))]


@pytest.mark.parametrize(
    ("changes", "specs", "local", "why"),
    [
        ({}, [], (), "model 'cnn' has no BatchNorm layer"),
        ({"strategy": "fedbn"}, SPECS, (MEAN, VARIANCE), "strategy 'fedbn' leaves the model's BatchNorm layers"),
        ({"aggregation": {"rule": "median"}}, SPECS, (), "aggregation.rule is 'median'"),
        ({}, [TensorSpec(MEAN, "F32", (1 << 21,))], (), "above 4194304 bytes"),
    ],
)  # fmt: skip
def test_a_plan_may_ask_for_it_only_where_it_can_be(changes, specs, local, why):
    def wanted(wish):
        asked = plan(strategy_options={"recalibrate": wish}, **changes)
        return load_strategy(asked).statistics_to_measure(asked, specs, local)

    with pytest.raises(PlanError, match=why) as raised:
        wanted(True)
    assert "'auto'" in raised.value.hint
    assert wanted("auto") == wanted(False) == []


def test_the_first_model_tells_what_is_measured_in_its_run(tmp_path):
    found = initialise(tmp_path, plan_for("fedavg", recalibrate=True))["statistic_tensors"]
    model = load_tensors(tmp_path / "model")
    assert {name for name, _, _ in found} == {n for n in model if n.endswith(("running_mean", "running_var"))}
    assert all(dtype == "F32" and tuple(shape) == model[name].shape for name, dtype, shape in found)
    assert initialise(tmp_path, plan_for("fedavg"))["statistic_tensors"] == []
    assert initialise(tmp_path, plan_for("fedbn", recalibrate="auto"))["statistic_tensors"] == []
    with pytest.raises(PlanError, match="strategy 'fedbn' leaves the model's BatchNorm layers at the sites"):
        initialise(tmp_path, plan_for("fedbn", recalibrate=True))
    plain = plan_for("fedavg", recalibrate=True).model_copy(
        update={"model": plan_for().model.model_copy(update={"norm": "group"})}
    )
    with pytest.raises(PlanError, match="has no BatchNorm layer"):
        ServerCompute().measure({"plan": plain.to_json(), "compute": {"device": "cpu"}}, None)


def test_what_is_no_longer_what_arrived_is_not_pooled(tmp_path):
    path = tmp_path / "a"
    digest = save_state(path, {MEAN: torch.zeros(2), VARIANCE: torch.ones(2)})
    report = {"num_examples": 30, "num_steps": 1}
    statistics = {"site": "a", "path": str(path), "digest": digest, "report": report}
    model = {"path": str(tmp_path / "model"), "digest": save_state(tmp_path / "model", MODEL)}
    args = {
        "compute": {"device": "cpu", "threads": 1}, "plan": plan(min_sites=1).to_json(), "round": 1,
        "model": model, "statistics": [statistics], "out": str(tmp_path / "out"),
    }  # fmt: skip
    assert ServerCompute().pool_statistics(args, Job(1, lambda m: None))["digest"]
    whole = path.read_bytes()
    for damaged in (whole[:-1] + b"!", None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        found = ServerCompute().pool_statistics(args, Job(1, lambda m: None))
        assert found == {"digest": None, "damaged": ["a"]}, "the site can be asked again"
    path.write_bytes(whole)
    (tmp_path / "model").write_bytes((tmp_path / "model").read_bytes()[:-1] + b"!")
    with pytest.raises(StorageError, match="the merged model of round 1: missing or damaged on"):
        ServerCompute().pool_statistics(args, Job(1, lambda m: None))
