"""What a site does with impressions: each term by hand, the mixing in a real forward pass."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedagent.impression_bank import ResidentBank
from fedagent.objectives import load_objective
from fedagent.objectives.base import Batch, LocalContext, Outputs
from fedagent.objectives.contrast import supervised_contrast
from fedagent.objectives.distillation import feature_loss, soft_target_loss
from fedagent.objectives.impressions import ImpressionsOptions, ramped
from fedcore.device import open_device
from fedcore.errors import DataError, LearningError, PlanError
from fedcore.models import build_model
from fedcore.models.state_file import save_state
from fedcore.plan import Plan
from fedserver.strategies import load_strategy
from fedserver.strategies.fedimpres import LOCAL_OPTIONS

LABELS = torch.tensor([0, 1, 1, 0])
MASK = torch.tensor([False, False, True, True])
LOGITS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, -1.0]])
FEATURES = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0], [3.0, 0.0]])
SOFT = torch.tensor([[0.2, 0.8], [0.7, 0.3]]).log()


def plan_for(norm="batch"):
    return Plan(name="p", rounds=9, model={"name": "cnn", "classes": 2, "input": (1, 8, 8), "norm": norm})


def context(round_number=5, counts=(3.0, 1.0), model=None):
    return LocalContext(
        site="a", run="r", round=round_number, model=model, class_counts=torch.tensor(counts),
        state=Path("unused"), build_global_model=lambda: None,
    )  # fmt: skip


def batch(extras=None, images=None):
    extras = {"soft_targets": SOFT, "features": torch.ones(2, 2)} if extras is None else extras
    images = torch.zeros(4, 1, 8, 8) if images is None else images
    return Batch(images, LABELS, MASK, extras=extras, num_impressions=2)


def loss_of(*, round_number=5, extras=None, **options):
    objective = load_objective("impressions", options)
    return objective.loss(batch(extras), Outputs(FEATURES, LOGITS), context(round_number)).item()


# terms


def test_soft_targets_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    by_hand = sum(p * torch.tensor(p / 0.5).log().item() for p in (0.2, 0.8, 0.7, 0.3)) / 2
    assert soft_target_loss(logits, SOFT, 1.0).item() == pytest.approx(by_hand, abs=1e-6)
    assert soft_target_loss(SOFT + 5, SOFT, 3.0).item() == pytest.approx(0, abs=1e-6)
    # Softer targets at T = 2: proportional to the square root of the probabilities.
    root = SOFT.exp().sqrt() / SOFT.exp().sqrt().sum(1, keepdim=True)
    expected = 4 * (root * (root / 0.5).log()).sum() / 2
    assert soft_target_loss(logits, SOFT, 2.0).item() == pytest.approx(expected.item(), abs=1e-6)


def test_feature_distance_by_hand_and_without_a_unit():
    targets = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    features = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert feature_loss(features, targets).item() == pytest.approx(((1 + 4) / 2) / ((1 + 9) / 2))
    assert feature_loss(100 * features, 100 * targets).item() == pytest.approx(0.5)


def test_contrast_by_hand():
    # Unit features e1, e2, e2, e1; each has one partner at cosine 1 and two others at 0.
    expected = -torch.tensor([1.0, 0.0, 0.0]).div(0.5).log_softmax(0)[0]
    assert supervised_contrast(FEATURES, LABELS, 0.5).item() == pytest.approx(expected.item())
    assert supervised_contrast(FEATURES, torch.arange(4), 0.5).item() == 0
    alone = supervised_contrast(FEATURES, torch.tensor([0, 1, 2, 0]), 0.5)
    assert torch.isfinite(alone)
    assert alone > 0


@pytest.mark.parametrize(
    ("term", "shape"),
    [
        (lambda z: soft_target_loss(z, SOFT, 2.0), (2, 2)),
        (lambda f: feature_loss(f, torch.ones(2, 2)), (2, 2)),
        (lambda f: supervised_contrast(f, LABELS, 0.5), (4, 3)),
    ],
)
def test_gradients_are_those_of_the_value(term, shape):
    torch.manual_seed(0)
    given = torch.randn(shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(term(given), [given])
    step = 1e-2 * torch.randn(shape)
    with torch.no_grad():
        slope = (term(given + step) - term(given - step)) / 2
    assert (gradient * step).sum().item() == pytest.approx(slope.item(), abs=2e-4)


# the sum


def test_the_sum_of_all_terms_by_hand():
    adjusted = LOGITS.clone()
    adjusted[:2] += 0.5 * torch.tensor([0.75, 0.25]).log()
    each = F.cross_entropy(adjusted, LABELS, reduction="none")
    expected = (each[:2].sum() + 0.25 * each[2:].sum()) / 2.5
    expected = expected + 2 * soft_target_loss(LOGITS[2:], SOFT, 3.0)
    expected = expected + 0.1 * feature_loss(FEATURES[2:], torch.ones(2, 2))
    expected = expected + 0.3 * supervised_contrast(FEATURES, LABELS, 0.2)
    found = loss_of(
        logit_adjustment=0.5, impression_weight=0.25, soft_weight=2, temperature=3, feature_weight=0.1,
        contrast_weight=0.3, contrast_temperature=0.2,
    )  # fmt: skip
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_the_ramp_brings_impressions_in():
    assert [ramped(r, 3, 4) for r in range(1, 9)] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [ramped(r, 1, 0) for r in (1, 7)] == [1, 1]
    options = {"soft_weight": 1.0, "ramp_from": 4, "ramp_rounds": 4}
    before = loss_of(round_number=3, **options)
    assert before == pytest.approx(F.cross_entropy(LOGITS[:2], LABELS[:2]).item())
    half = loss_of(round_number=5, **options)
    assert half == pytest.approx(loss_of(soft_weight=0.5, impression_weight=0.5))


def test_a_bank_without_what_a_term_needs_names_site_round_and_tensor():
    with pytest.raises(LearningError, match=r"a round 5: the bank of impressions has no 'soft_targets'"):
        loss_of(extras={"features": torch.ones(2, 2)}, soft_weight=1)
    with pytest.raises(LearningError, match=r"has no 'features', it brings nothing beside"):
        loss_of(extras={}, feature_weight=1)
    assert loss_of(extras={}) == pytest.approx(F.cross_entropy(LOGITS, LABELS).item())


# BatchNorm


def answer(mode, model, images, num_impressions=2):
    objective = load_objective("impressions", {"batchnorm": mode})
    given = Batch(images, LABELS, MASK, num_impressions=num_impressions)
    return objective.outputs(given, context(model=model)).features


def training_model(norm="batch"):
    torch.manual_seed(1)
    return build_model(plan_for(norm).model).train()


@pytest.fixture
def images():
    torch.manual_seed(0)
    mixed = torch.randn(4, 1, 8, 8)
    mixed[2:] = 4 * mixed[2:] + 7
    return mixed


def test_shared_statistics_are_those_of_the_mixed_batch(images):
    model = training_model()
    assert torch.equal(answer("shared", model, images), training_model().features(images))
    mean = model.conv1(images).mean((0, 2, 3))
    assert torch.allclose(model.norm1.running_mean, 0.1 * mean, atol=1e-6)


def test_separate_impressions_leave_no_statistics(images):
    model, alone = training_model(), training_model()
    features = answer("separate", model, images)
    real, impressions = alone.features(images[:2]), training_model().features(images[2:])
    assert torch.allclose(features, torch.cat([real, impressions]), atol=1e-6)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    features.sum().backward()
    assert model.conv1.weight.grad.abs().sum() > 0


def test_frozen_statistics_are_the_global_models_once_there_are_impressions(images):
    model = training_model()
    answer("frozen_global", model, images, num_impressions=0)
    assert model.norm1.num_batches_tracked == 1
    before = model.norm1.running_mean.clone()
    features = answer("frozen_global", model, images)
    assert torch.equal(model.norm1.running_mean, before)
    assert torch.allclose(features, model.eval().features(images), atol=1e-6)


@pytest.mark.parametrize("mode", ["shared", "separate", "frozen_global"])
def test_groupnorm_knows_no_difference(images, mode):
    model = training_model("group")
    assert torch.allclose(answer(mode, model, images), model.features(images), atol=1e-5)


# options and bank


def test_the_strategys_options_are_the_objectives():
    plan = plan_for().model_copy(update={"strategy": "fedimpres", "strategy_options": {"soft_weight": 0.5}})
    strategy = load_strategy(plan)
    assert set(LOCAL_OPTIONS) == set(ImpressionsOptions.model_fields)
    loaded = load_objective(strategy.objective, strategy.objective_options)
    assert (loaded.options.soft_weight, loaded.options.sampling, loaded.options.logit_adjustment) == (
        0.5,
        "lack",
        1.0,
    )
    paper = load_strategy(plan_for().model_copy(update={"strategy": "fedimpres_paper"}))
    published = load_objective(paper.objective, paper.objective_options)
    assert published.options == ImpressionsOptions()
    assert (paper.synthesis.steps, paper.synthesis.dual_passes, paper.synthesis.image_lr) == (10, 3, 100)
    assert (paper.synthesis.gamma, paper.synthesis.rho, paper.synthesis.warm_start) == (0.01, 0.01, False)
    with pytest.raises(PlanError, match="'batchnorm'"):
        load_objective("impressions", {"batchnorm": "local"})


@pytest.fixture(scope="module")
def device():
    return open_device("cpu", 1)


def bank_file(path, count=6, **changes):
    tensors = {
        "images": torch.zeros(count, 1, 8, 8, dtype=torch.uint8), "labels": torch.arange(count) % 2,
        "soft_targets": torch.zeros(count, 2, dtype=torch.float16),
        "features": torch.arange(count * 3).reshape(count, 3).half(), **changes,
    }  # fmt: skip
    save_state(path, tensors)
    return path


def test_a_banks_extras_come_with_their_images(tmp_path, device):
    bank = ResidentBank.open(bank_file(tmp_path / "bank"), plan_for(), device)
    assert len(bank) == 6
    pixels, labels, extras = bank.take(torch.tensor([5, 0]))
    assert pixels.shape == (2, 1, 8, 8)
    assert labels.tolist() == [1, 0]
    assert extras["features"].tolist() == [[15, 16, 17], [0, 1, 2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"soft_targets": torch.zeros(6, 3, dtype=torch.float16)}, "of 3 classes, the model has 2"),
        ({"soft_targets": torch.zeros(6, 2)}, "soft_targets are torch.float32"),
        ({"features": torch.zeros(5, 3, dtype=torch.float16)}, r"features are torch.float16 \[5, 3\]"),
        ({"features": torch.full((6, 3), torch.nan, dtype=torch.float16)}, "features hold NaN"),
    ],
)
def test_extras_that_do_not_suit_the_plan_are_refused(tmp_path, device, changes, message):
    with pytest.raises(DataError, match=message):
        ResidentBank.open(bank_file(tmp_path / "bank", **changes), plan_for(), device)


def test_terms_can_be_trained_on(images, device):
    model = training_model()
    objective = load_objective("impressions", {"soft_weight": 1, "feature_weight": 1, "contrast_weight": 1})
    given = batch({"soft_targets": SOFT, "features": torch.ones(2, 512)}, images)
    ctx = context(model=model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        loss = objective.loss(given, objective.outputs(given, ctx), ctx)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
