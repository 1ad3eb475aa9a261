"""Every built-in strategy through whole rounds on real images."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fedsim
from fedcore.data.benchmark_sets import Federation
from fedcore.models.state_file import load_tensors
from fedcore.plan import Plan
from fedserver import round_events as ev
from fedserver.strategies import BUILT_IN

MakePlan = Callable[..., Plan]


@pytest.mark.parametrize("strategy", sorted(BUILT_IN))
def test_two_rounds_with_finite_figures(strategy: str, federation: Federation, make_plan: MakePlan) -> None:
    result = fedsim.run(make_plan(strategy=strategy, strategy_options={"ema": 0.5}), federation)
    assert result.state == "DONE", result.reason
    for record in result.records:
        assert record.aggregated == 3
        assert record.loss is not None
        assert math.isfinite(record.loss)
        assert record.balanced_accuracy is not None
        assert all(math.isfinite(float(report["train_loss"])) for report in record.training.values())
    assert result.model is not None
    assert all(bool(torch.isfinite(t).all()) for t in load_tensors(result.model).values())
    assert all(value is not None and math.isfinite(value) for value in result.forgetting.values())


@pytest.mark.parametrize("strategy", ["fedopt", "moon", "scaffold", "vhl"])
def test_what_is_kept_between_rounds_is_the_same_bits_again(
    strategy: str, federation: Federation, make_plan: MakePlan
) -> None:
    plan = make_plan(strategy=strategy, rounds=3, strategy_options={"ema": 0.5})
    first, again = (fedsim.run(plan, federation, forgetting_rounds=0) for _ in range(2))
    assert [r.model for r in first.records] == [r.model for r in again.records]
    states = [
        [e.strategy_state for e in r.events if isinstance(e, ev.AggregationFinished)] for r in (first, again)
    ]
    assert states[0] == states[1]
    assert len(set(states[0])) == (3 if strategy in {"fedopt", "scaffold"} else 1)


def test_sites_score_and_go_on_with_their_own_normalisation(
    federation: Federation, make_plan: MakePlan
) -> None:
    shared, own = (
        fedsim.run(make_plan(strategy="fedimpres", strategy_options={"local_norm": local_norm}), federation)
        for local_norm in (False, True)
    )
    # The first round's updates are the same, and so is their mean: only what a site scores and goes on with differs.
    assert own.records[0].model == shared.records[0].model
    assert own.records[0].accuracy != shared.records[0].accuracy
    assert own.records[1].model != shared.records[1].model
    assert own.state == "DONE"
    assert all(value is not None for value in own.forgetting.values())


def test_strategies_differ(federation: Federation, make_plan: MakePlan) -> None:
    models = {
        name: fedsim.run(make_plan(strategy=name), federation, forgetting_rounds=0).model_digest
        for name in (
            "fedavg",
            "fedavg_uniform",
            "fedlc",
            "fedntd",
            "fedopt",
            "fedprox",
            "moon",
            "scaffold",
            "vhl",
        )
    }
    assert len(set(models.values())) == len(models)


def test_sites_train_from_the_newest_model_and_their_average_is_released(
    federation: Federation, make_plan: MakePlan, tmp_path: Path
) -> None:
    models: dict[bool, list[dict[str, torch.Tensor]]] = {}
    aggregated: dict[bool, list[str]] = {}
    for ema in (False, True):
        found: list[dict[str, torch.Tensor]] = []

        def keep(record: object, model: Path, found: list[dict[str, torch.Tensor]] = found) -> None:
            found.append({name: tensor.clone() for name, tensor in load_tensors(model).items()})

        options = {"ema": 0.8} if ema else {}
        result = fedsim.run(
            make_plan(rounds=3, strategy_options=options), federation, on_round=keep, forgetting_rounds=0
        )
        models[ema] = found
        aggregated[ema] = [e.model for e in result.events if isinstance(e, ev.AggregationFinished)]
        assert result.model is not None
        assert hashlib.sha256(result.model.read_bytes()).hexdigest() == result.records[-1].model
    assert aggregated[True] == aggregated[False]
    first, second, third = (model["head.bias"].double() for model in models[False])
    expected = (0.64 * first + 0.8 * second + third) / 2.44
    assert torch.allclose(models[True][2]["head.bias"].double(), expected, atol=1e-6)
    assert torch.equal(models[True][0]["head.bias"].double(), first)


def test_sites_are_sent_the_variates_with_the_model(federation: Federation, make_plan: MakePlan) -> None:
    plain = fedsim.run(make_plan(rounds=3), federation, forgetting_rounds=0).records
    scaffold = fedsim.run(make_plan(rounds=3, strategy="scaffold"), federation, forgetting_rounds=0).records
    extra = scaffold[0].bytes_up - plain[0].bytes_up
    assert extra > 0
    # Nothing to share in the first round, then as much as came up.
    assert [s.bytes_down - p.bytes_down for s, p in zip(scaffold, plain, strict=True)] == [0, extra, extra]


def test_ours_without_impressions_is_logit_adjusted_fedavg(
    federation: Federation, make_plan: MakePlan
) -> None:
    """The tables name fedlc's rows as ours with synthesis off."""
    ours = fedsim.run(
        make_plan(strategy="fedimpres", synthesis={"warmup_rounds": 9}), federation, forgetting_rounds=0
    )
    other = fedsim.run(make_plan(strategy="fedlc"), federation, forgetting_rounds=0)
    assert [r.model for r in ours.records] == [r.model for r in other.records]
