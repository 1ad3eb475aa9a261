from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedagent.objectives import BUILT_IN, load_objective, objective_names
from fedagent.objectives.base import Batch, LocalContext, Outputs
from fedagent.objectives.impressions import weighted_cross_entropy
from fedagent.objectives.proximal import squared_distance
from fedcore.errors import PlanError

LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
LABELS = torch.tensor([0, 0, 1])
MASK = torch.tensor([False, False, True])


def context(model, global_model=None):
    return LocalContext(
        site="a", run="r", round=1, model=model, class_counts=torch.tensor([1.0, 1.0]),
        state=Path("unused"), build_global_model=lambda: global_model,
    )  # fmt: skip


def loss_of(name, model=None, global_model=None, **options):
    objective = load_objective(name, options)
    batch = Batch(torch.zeros(3, 1, 2, 2), LABELS, MASK)
    return objective.loss(batch, Outputs(torch.zeros(3, 4), LOGITS), context(model, global_model))


def test_names_and_unknown_names():
    assert set(BUILT_IN) <= set(objective_names())
    with pytest.raises(PlanError, match=r"'prox' is unknown at this site.*proximal"):
        load_objective("prox", {})
    with pytest.raises(PlanError, match="unknown key 'nu'") as caught:
        load_objective("proximal", {"nu": 1})
    assert "mu" in caught.value.hint


def test_cross_entropy_is_the_mean():
    by_hand = -(LOGITS.log_softmax(1)[torch.arange(3), LABELS]).mean()
    assert loss_of("cross_entropy").item() == pytest.approx(by_hand.item())


def test_proximal_adds_half_mu_times_the_squared_distance():
    model, start = nn.Linear(2, 2), nn.Linear(2, 2)
    with torch.no_grad():
        for p, q in zip(model.parameters(), start.parameters(), strict=True):
            q.copy_(p + 2.0)
    plain = loss_of("cross_entropy").item()
    assert loss_of("proximal", model, start, mu=0.5).item() == pytest.approx(plain + 0.25 * 6 * 4.0)
    assert loss_of("proximal", model, start, mu=0.0).item() == pytest.approx(plain)


def test_proximal_pulls_the_parameters_only():
    model, start = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    ctx = context(model, start)
    squared_distance(ctx.parameter_pairs).backward()
    expected = 2 * (model.weight - start.weight)
    assert torch.allclose(model.weight.grad, expected)
    assert start.weight.grad is None
    assert not start.training


def test_impressions_of_weight_one_are_the_joint_mean():
    assert loss_of("impressions").item() == pytest.approx(F.cross_entropy(LOGITS, LABELS).item())


@pytest.mark.parametrize("weight", [0.0, 0.3, 2.0])
def test_impressions_are_weighted(weight):
    each = F.cross_entropy(LOGITS, LABELS, reduction="none")
    expected = (each[0] + each[1] + weight * each[2]) / (2 + weight)
    assert weighted_cross_entropy(LOGITS, LABELS, MASK, weight).item() == pytest.approx(expected.item())


def test_only_impressions_mixes_them():
    assert [n for n in sorted(BUILT_IN) if load_objective(n, {}).mixes_impressions] == ["impressions"]
