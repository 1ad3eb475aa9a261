"""The sites' halves of strategies on a handful of numbers, each figure worked out by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedagent.objectives import load_objective
from fedagent.objectives.base import Batch, LocalContext, Outputs
from fedagent.objectives.cross_entropy import class_margins
from fedagent.objectives.moon import model_contrast
from fedagent.objectives.ntd import not_true, not_true_divergence
from fedagent.objectives.scaffold import path_length
from fedagent.resident import ResidentImages
from fedagent.trainer import TrainRequest, train
from fedcore.compute_worker import Job
from fedcore.data import LabelledImages
from fedcore.device import open_device
from fedcore.errors import PlanError
from fedcore.models import build_model
from fedcore.models.state_file import load_tensors, save_state
from fedcore.plan import Plan, TrainingSection

LOGITS = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, -1.0]])
LABELS = torch.tensor([0, 2])


class OneWeight(nn.Module):
    """y = w x."""

    def __init__(self, weight):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([float(weight)]))

    def forward(self, x):
        return self.w * x


def context(model=None, start=None, counts=(3.0, 1.0, 0.0), **over):
    return LocalContext(
        site="a", run="r", round=1, model=model or OneWeight(0), class_counts=torch.tensor(counts),
        state=Path("unused"), build_global_model=lambda: start, **over,
    )  # fmt: skip


def batch():
    return Batch(torch.zeros(2, 1, 2, 2), LABELS, torch.tensor([False, False]))


def loss_of(name, ctx=None, **options):
    outputs = Outputs(torch.zeros(2, 4), LOGITS)
    return load_objective(name, options).loss(batch(), outputs, ctx or context())


def test_calibration_by_log_share_is_balanced_softmax():
    # 3, 1 and (for none) 0.1 images of 4.1: e^logit is weighed by the shares.
    weights = torch.tensor([3.0, 1.0, 0.1]) / 4.1
    shares = weights * LOGITS.exp()
    expected = -(shares / shares.sum(1, keepdim=True))[torch.arange(2), LABELS].log().mean()
    assert loss_of("cross_entropy", logit_adjustment=1.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_calibration_by_fourth_root_is_fedlcs():
    assert class_margins(torch.tensor([16.0, 1.0]), "fourth_root").tolist() == pytest.approx([-0.5, -1.0])
    calibrated = LOGITS - 2.0 * torch.tensor([81.0, 16.0, 1.0]).pow(-0.25)
    found = loss_of(
        "cross_entropy", context(counts=(81.0, 16.0, 1.0)), logit_adjustment=2.0, calibration="fourth_root"
    )
    assert found.item() == pytest.approx(F.cross_entropy(calibrated, LABELS).item())


@pytest.mark.parametrize("form", ["log", "fourth_root"])
def test_a_class_that_the_site_lacks_is_hardly_pushed_down(form):
    logits = torch.zeros(1, 3, requires_grad=True)
    objective = load_objective("cross_entropy", {"logit_adjustment": 1.0, "calibration": form})
    one = Batch(torch.zeros(1, 1, 2, 2), torch.tensor([0]), torch.tensor([False]))
    objective.loss(one, Outputs(torch.zeros(1, 4), logits), context(counts=(300.0, 100.0, 0.0))).backward()
    assert abs(logits.grad[0, 2].item()) < 1e-3 < abs(logits.grad[0, 1].item())


def test_not_true_logits_leave_the_own_class_out():
    assert not_true(LOGITS, LABELS).tolist() == [[0.0, 1.0], [0.0, 1.0]]


def test_not_true_divergence_by_hand():
    # Local logits (0, 1) and global ones (0, 0) at temperature 2: q = softmax(0, 0.5), p = (1/2, 1/2).
    q = 1 / (1 + math.exp(0.5))
    expected = 4 * (0.5 * math.log(0.5 / q) + 0.5 * math.log(0.5 / (1 - q)))
    found = not_true_divergence(LOGITS, torch.zeros(2, 3), LABELS, temperature=2.0)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert not_true_divergence(LOGITS, LOGITS, LABELS, temperature=1.0).item() == pytest.approx(0, abs=1e-7)


def test_ntd_adds_beta_times_the_divergence():
    class Zero(nn.Module):
        def forward(self, images):
            return torch.zeros(len(images), 3)

    plain = F.cross_entropy(LOGITS, LABELS).item()
    extra = not_true_divergence(LOGITS, torch.zeros(2, 3), LABELS, temperature=1.0).item()
    assert loss_of("ntd", context(start=Zero()), beta=0.5).item() == pytest.approx(plain + 0.5 * extra)
    assert loss_of("ntd", beta=0.0).item() == pytest.approx(plain)


def test_model_contrast_by_hand():
    features, towards, away = (
        torch.tensor([[3.0, 0.0]]),
        torch.tensor([[2.0, 0.0]]),
        torch.tensor([[0.0, 5.0]]),
    )
    # Similarities 1 and 0 at temperature 1/2: -log(e^2 / (e^2 + 1)).
    expected = -math.log(math.exp(2) / (math.exp(2) + 1))
    assert model_contrast(features, towards, away, temperature=0.5).item() == pytest.approx(expected)
    assert model_contrast(features, away, away, temperature=0.5).item() == pytest.approx(math.log(2))


def test_moon_without_a_model_of_its_own_is_cross_entropy():
    objective = load_objective("moon", {"mu": 5.0})
    objective.begin(context())
    found = objective.loss(batch(), Outputs(torch.zeros(2, 4), LOGITS), context())
    assert found.item() == pytest.approx(F.cross_entropy(LOGITS, LABELS).item())


def test_scaffold_corrects_the_gradient_and_reports_its_change():
    model = OneWeight(1.0)
    ctx = context(
        model, OneWeight(1.0), strategy_state={"variate/w": torch.tensor([0.5])},
        kept={"variate/w": torch.tensor([0.2])}, learning_rate=0.1, training=TrainingSection(momentum=0.0),
    )  # fmt: skip
    objective = load_objective("scaffold", {})
    objective.begin(ctx)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        loss = objective.loss(batch(), Outputs(torch.zeros(2, 4), LOGITS), ctx)
        # The correction is worth nothing; its gradient is c - c_i = 0.3 (nothing else depends on w here).
        assert loss.item() == pytest.approx(F.cross_entropy(LOGITS, LABELS).item())
        loss.backward()
        assert model.w.grad.item() == pytest.approx(0.3)
        optimiser.step()
    # w = 1 - 2 * 0.1 * 0.3. c_i+ = c_i - c + (x - y) / (K eta) = 0.2 - 0.5 + 0.06 / 0.2 = 0: the site's own
    # gradient, which is zero here.
    ending = objective.end(ctx, 2)
    assert ending.kept["variate/w"].item() == pytest.approx(0.0, abs=1e-6)
    assert ending.extras["aux/variate/w"].item() == pytest.approx(-0.2, abs=1e-6)


def test_path_of_momentum_is_how_far_a_constant_gradient_carries():
    model = OneWeight(0.0)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        model.w.grad = torch.ones(1)
        optimiser.step()
    # Velocities 1, 1.9, 2.71.
    assert path_length(0.1, 0.9, 3) == pytest.approx(0.561)
    assert -model.w.item() == pytest.approx(0.561)
    assert path_length(0.1, 0.0, 5) == pytest.approx(0.5)


def test_scaffold_refuses_another_optimiser():
    ctx = context(training=TrainingSection(optimizer="adamw"))
    with pytest.raises(PlanError, match=r"training.optimizer is 'adamw', expected 'sgd'"):
        load_objective("scaffold", {}).begin(ctx)


# -- through the trainer: what stays, what travels ------------------------------------------------


def ask(folder, round_number, objective, **options):
    plan = Plan(
        name="p", rounds=4, seed=1,
        model={"name": "cnn", "classes": 3, "input": (1, 8, 8), "options": {"width": 4}},
        training={"batch_size": 8, "learning_rate": 0.05},
    )  # fmt: skip
    if not (folder / "model").exists():
        torch.manual_seed(0)
        save_state(folder / "model", build_model(plan.model).state_dict())
    shared = folder / "shared"
    return TrainRequest(
        plan=plan, site="a", run="r", round=round_number, model=folder / "model", impressions=None,
        strategy_state=shared if shared.exists() else None, objective=objective, objective_options=options,
        local_tensors=(), state=folder / "state", out=folder / "update",
    )  # fmt: skip


def run(folder, round_number, objective, **options):
    rng = np.random.default_rng(0)
    images = LabelledImages(
        rng.integers(0, 255, (20, 8, 8, 1), dtype=np.uint8), rng.integers(0, 3, 20).astype(np.int64)
    )
    device = open_device("cpu", 1)
    request = ask(folder, round_number, objective, **options)
    return train(request, ResidentImages.of(images, device), device, Job(1, lambda message: None)).digest


@pytest.mark.parametrize("objective", ["scaffold", "moon"])
def test_a_repeated_round_starts_from_the_same_own_state(tmp_path, objective):
    first = run(tmp_path, 1, objective)
    second = run(tmp_path, 2, objective)
    assert run(tmp_path, 2, objective) == second
    assert run(tmp_path, 1, objective) == first
    # Without what round 1 left, round 2 comes out differently.
    for path in (tmp_path / "state").iterdir():
        path.unlink()
    assert run(tmp_path, 2, objective) != second


def test_moon_keeps_its_model_and_sends_the_plain_update(tmp_path):
    run(tmp_path, 1, "moon")
    update = load_tensors(tmp_path / "update")
    kept = load_tensors(tmp_path / "state" / "round-00000001.safetensors")
    assert {f"kept/{name}" for name in update} == set(kept)
    assert all(torch.equal(kept[f"kept/{name}"], tensor) for name, tensor in update.items())


def test_scaffold_sends_a_change_for_each_parameter_and_uses_what_is_shared(tmp_path):
    alone = run(tmp_path, 1, "scaffold")
    update = {name: tensor.clone() for name, tensor in load_tensors(tmp_path / "update").items()}
    changes = {n.removeprefix("aux/variate/"): t for n, t in update.items() if n.startswith("aux/")}
    assert set(changes) == {n for n in update if n.endswith(("weight", "bias")) and not n.startswith("aux/")}
    save_state(tmp_path / "shared", {f"variate/{n}": torch.full_like(t, 0.1) for n, t in changes.items()})
    assert run(tmp_path, 1, "scaffold") != alone
    moved = load_tensors(tmp_path / "update")
    # 3 steps of 0.05 with momentum 0.9 carry a gradient of 0.1 by path * 0.1, to first order.
    path = path_length(0.05, 0.9, 3)
    shift = (moved["head.bias"] - update["head.bias"]).mean().item()
    assert shift == pytest.approx(-0.1 * path, rel=0.2)
