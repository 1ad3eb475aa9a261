"""Names of BatchNorm statistics: what layers really have, and what only looks like one."""

import pytest
from torch import nn

from fedcore.models.base import batch_norm_layers
from fedcore.norm_statistics import statistic_names, variance_partner


def test_names_are_those_of_layers_at_any_depth() -> None:
    for model in (nn.BatchNorm2d(2), nn.Sequential(nn.Sequential(nn.BatchNorm1d(2)), nn.BatchNorm2d(2))):
        state = model.state_dict()
        layers = batch_norm_layers(model)
        pairs = [statistic_names(layer) for layer in layers]
        assert {name for pair in pairs for name in pair} == {
            name for name in state if name.endswith(("running_mean", "running_var"))
        }
        assert [variance_partner(variance) for _, variance in pairs] == [mean for mean, _ in pairs]


@pytest.mark.parametrize(
    "name", ["layer.running_mean", "my_running_var", "layer.my_running_var", "running_var.weight", "w", ""]
)
def test_other_tensors_have_no_partner(name: str) -> None:
    assert variance_partner(name) is None


def test_what_a_strategy_adds_is_no_statistic() -> None:
    assert variance_partner("aux/variate/bn.running_var") is None
