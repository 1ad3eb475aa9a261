"""Bad sites in whole runs: what the gate leaves out, and rules with every kind of strategy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fedsim
from fedcore.data.benchmark_sets import Federation, load_benchmark
from fedcore.plan import Plan
from fedserver.event_text import event_text
from fedsim.attacks import ATTACKS, attacked
from fedsim.simulation import replay

MakePlan = Callable[..., Plan]


@pytest.fixture(scope="module")
def five() -> Federation:
    return load_benchmark("digits", sites=5, alpha=None, seed=0, max_train=150)


def run(plan: Plan, federation: Federation, **options: Any) -> fedsim.Result:
    return fedsim.run(plan, federation, forgetting_rounds=0, check_impressions=False, **options)


@pytest.mark.parametrize("attack", ["scaled", "nan", "random"])
def test_the_gate_leaves_a_bad_site_out_and_the_record_says_why(
    attack: Any, five: Federation, make_plan: MakePlan
) -> None:
    plan = make_plan(rounds=1, gate={"refuse_factor": 6})
    result = run(plan, five, attacks={"site-2": attack})
    (record,) = result.records
    assert (record.reported, record.aggregated) == (5, 4)
    assert list(record.missing) == ["site-2"]
    assert record.missing["site-2"].startswith("update refused: site-2 round 1:")
    assert {site for site, verdict in record.gate.items() if not verdict.passed} == {"site-2"}
    assert all(verdict.registered == verdict.num_examples for verdict in record.gate.values())
    assert record.merge is not None
    assert set(record.merge.weights) == {"site-1", "site-3", "site-4", "site-5"}
    assert [r.record() for r in replay(plan, result.events).records] == result.records
    without = run(make_plan(rounds=1, sites=["site-1", "site-3", "site-4", "site-5"]), five)
    assert without.model_digest == result.model_digest


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold"])
def test_a_site_whose_updates_are_too_long_is_shortened_and_stays(
    strategy: str, five: Federation, make_plan: MakePlan
) -> None:
    plan = make_plan(strategy=strategy, rounds=4)
    result = run(plan, five, attacks={"site-2": "scaled"})
    assert result.state == "DONE"
    assert all(record.missing == {} and record.aggregated == 5 for record in result.records)
    kept = [record.gate["site-2"].kept["parameters"] for record in result.records]
    assert all(0.05 < share < 1 for share in kept)
    assert not any(record.gate[site].kept for record in result.records for site in ("site-1", "site-3"))
    assert any("; site-2 round 1: parameters moved by" in event_text(event) for event in result.events)
    assert [r.record() for r in replay(plan, result.events).records] == result.records
    assert run(plan, five, attacks={"site-2": "scaled"}).model_digest == result.model_digest
    refusing = make_plan(strategy=strategy, rounds=4, gate={"refuse_factor": 1.5})
    assert run(refusing, five, attacks={"site-2": "scaled"}).model_digest != result.model_digest


@pytest.mark.parametrize(
    ("rule", "strategy"),
    [("median", "scaffold"), ("trimmed_mean", "fedopt"), ("multi_krum", "scaffold"), ("norm_clip", "fedbn")],
)
def test_rules_go_with_strategies_that_keep_state(
    rule: str, strategy: str, five: Federation, make_plan: MakePlan
) -> None:
    plan = make_plan(strategy=strategy, aggregation={"rule": rule}, gate={"check_norm": False})
    first, again = (run(plan, five, attacks={"site-2": "scaled"}) for _ in range(2))
    assert first.state == "DONE"
    assert first.model_digest == again.model_digest
    record = first.records[-1]
    assert record.merge is not None
    assert record.merge.rule == rule
    if rule == "multi_krum":
        assert record.merge.weights["site-2"] == 0.0
        assert record.missing == {}
    if rule == "norm_clip":
        assert record.merge.weights["site-2"] < min(
            weight for site, weight in record.merge.weights.items() if site != "site-2"
        )
    assert run(make_plan(strategy=strategy), five).model_digest != first.model_digest


def test_a_site_that_is_always_late_is_folded_in_and_dropped_otherwise(
    five: Federation, make_plan: MakePlan
) -> None:
    folding = make_plan(rounds=4, limits={"late_updates": "fold"})
    result = run(folding, five, late_sites=["site-2"])
    assert [list(record.missing) for record in result.records] == [["site-2"]] * 4
    assert [record.folded.keys() for record in result.records] == [set(), {"site-2"}, {"site-2"}, {"site-2"}]
    late = result.records[1].folded["site-2"]
    assert (late.round, late.share, late.verdict.passed) == (1, 0.5, True)
    assert late.verdict.registered == late.verdict.num_examples
    assert [r.record() for r in replay(folding, result.events).records] == result.records
    dropped = run(make_plan(rounds=4), five, late_sites=["site-2"])
    assert dropped.records[0].model == result.records[0].model
    assert dropped.records[1].model != result.records[1].model
    assert "parked until round 7" in dropped.records[3].missing["site-2"]


def test_attacks_leave_statistics_alone() -> None:
    start = {"w": torch.ones(4), "bn.running_var": torch.ones(2), "n": torch.tensor(1)}
    end = {"w": torch.full((4,), 2.0), "bn.running_var": torch.full((2,), 3.0), "n": torch.tensor(5)}
    generator = torch.Generator().manual_seed(0)
    sent = {attack: attacked(attack, start, end, generator) for attack in ATTACKS}
    assert sent["scaled"]["w"].tolist() == [11.0] * 4
    assert sent["sign_flipped"]["w"].tolist() == [0.0] * 4
    assert sent["reversed"]["w"].tolist() == [-9.0] * 4
    assert bool(sent["nan"]["w"].isnan().all())
    assert not torch.equal(sent["random"]["w"], end["w"])
    for tensors in sent.values():
        assert torch.equal(tensors["bn.running_var"], end["bn.running_var"])
        assert torch.equal(tensors["n"], end["n"])
