"""BatchNorm statistics measured after the merge, in whole runs on real images."""

from collections.abc import Callable

import pytest

import fedsim
from fedcore.data.benchmark_sets import Federation
from fedcore.models.state_file import load_tensors
from fedcore.plan import Plan
from fedserver import round_events as ev
from fedsim.simulation import replay

MakePlan = Callable[..., Plan]


def is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var"))


def digests(plan: Plan, federation: Federation) -> list[str]:
    result = fedsim.run(plan, federation, forgetting_rounds=0)
    assert result.state == "DONE", result.reason
    return [record.model for record in result.records]


def test_only_the_statistics_of_a_merged_model_change(federation: Federation, make_plan: MakePlan) -> None:
    """After one round the weights are those of a run without it: training does not read what is stored."""
    models = {}
    for wish in (False, True):
        plan = make_plan(rounds=1, strategy_options={"recalibrate": wish})
        result = fedsim.run(plan, federation, forgetting_rounds=0)
        assert result.model is not None
        models[wish] = load_tensors(result.model)
    for name, value in models[True].items():
        assert value.equal(models[False][name]) != is_statistic(name), name
        assert value.dtype == models[False][name].dtype


@pytest.mark.parametrize("strategy", ["fedavg", "fedimpres"])
def test_an_average_over_rounds_is_recalibrated_again_and_again_to_the_same_bits(
    strategy: str, federation: Federation, make_plan: MakePlan
) -> None:
    plan = make_plan(strategy=strategy, rounds=3, strategy_options={"recalibrate": True, "ema": 0.5})
    first, again = (fedsim.run(plan, federation, forgetting_rounds=0) for _ in range(2))
    assert [r.model for r in first.records] == [r.model for r in again.records]
    assert len({r.model for r in first.records}) == 3
    for record in first.records:
        assert record.recalibration is not None
        assert len(record.recalibration.num_examples) == 3
        assert not record.recalibration.note
    happened = [e for e in first.events if isinstance(e, ev.AggregationFinished | ev.ModelRecalibrated)]
    assert [e.kind for e in happened] == ["aggregation_finished", "model_recalibrated"] * 3
    assert replay(plan, first.events).finished == 3


def test_auto_is_on_where_nothing_stands_against_it_and_else_changes_nothing(
    federation: Federation, make_plan: MakePlan
) -> None:
    def models(wish: object, **over: object) -> list[str]:
        return digests(make_plan(rounds=1, strategy_options={"recalibrate": wish}, **over), federation)

    assert models("auto") == models(True) != models(False)
    for over in ({"model": {"norm": "group"}}, {"strategy": "fedbn"}, {"aggregation": {"rule": "median"}}):
        assert models("auto", **over) == models(False, **over), over
