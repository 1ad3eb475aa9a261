"""The terms of the synthesis objective: each by hand, each gradient by finite differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedserver.synthesis import loss, objective
from fedserver.synthesis.objective import LayerStatistics
from fedserver.synthesis.options import SynthesisOptions

LABELS = torch.tensor([0, 1, 2, 0])


def doubles(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def test_head_gradient_is_autograds():
    torch.manual_seed(0)
    head = nn.Linear(5, 3)
    features, labels = torch.randn(7, 5), torch.tensor([0, 1, 2, 0, 1, 2, 2])
    logits = head(features)
    F.cross_entropy(logits, labels).backward()
    ours = objective.head_gradient(logits.detach(), features, labels)
    assert torch.allclose(ours, head.weight.grad, atol=1e-6)


def test_augmented_lagrangian_and_dual_by_hand():
    residual = objective.stationarity_residual(torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, -20.0]]), 0.1)
    assert residual.tolist() == [[2.0, 0.0]]
    dual = torch.tensor([[3.0, 5.0]])
    assert objective.augmented_lagrangian(residual, dual, 0.5).item() == pytest.approx(0.25 * 4 + 6)
    assert objective.updated_dual(dual, residual, 0.5).tolist() == [[4.0, 5.0]]


def test_the_relative_residual_has_no_scale_and_is_at_most_one():
    gradient, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 50.0]])
    residual = objective.relative_residual(gradient, weight, 0.1)
    assert residual.tolist() == [[pytest.approx(0.3), pytest.approx(0.9)]]  # (3, 4 + 5) / (5 + 5)
    assert torch.allclose(objective.relative_residual(1000 * gradient, 1000 * weight, 0.1), residual)
    assert objective.relative_residual(-0.1 * weight, weight, 0.1).norm() == 0
    assert objective.relative_residual(0 * gradient, weight, 0.1).norm() == pytest.approx(1)
    assert torch.isfinite(objective.relative_residual(0 * gradient, 0 * weight, 0.1)).all()


def test_margin_by_hand():
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 9.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    # Leads 2, 9, -1, -2 of a width of 4.
    assert objective.margin(logits, LABELS, 4.0).item() == pytest.approx((2 + 0 + 5 + 6) / 4)


def test_total_variation_and_mean_square_by_hand():
    image = torch.tensor([[[[0.0, 1.0], [3.0, 3.0]]]])
    slopes = (9 + 4) / 2 + (1 + 0) / 2
    assert objective.total_variation(image).item() == pytest.approx(slopes * (2 / 28) ** 2)
    assert objective.total_variation(torch.ones(2, 3, 1, 1)).item() == 0.0
    assert objective.mean_square(image).item() == pytest.approx(19 / 4)


def test_total_variation_does_not_depend_on_the_resolution():
    x = torch.linspace(0, 1, 56)
    picture = (6 * x[:, None]).sin() * (4 * x[None, :]).cos()
    large = picture[None, None]
    small = F.interpolate(large, size=(28, 28), mode="bilinear", align_corners=True)
    ratio = objective.total_variation(large) / objective.total_variation(small)
    assert ratio.item() == pytest.approx(1, abs=0.1)


def test_agreement_by_hand():
    same = torch.tensor([[2.0, -1.0], [0.0, 1.0]])
    assert objective.agreement(same, same).item() == pytest.approx(1)
    far = torch.tensor([[60.0, -60.0]])
    assert objective.agreement(far, -far).item() == pytest.approx(0, abs=1e-5)
    # p = (1/2, 1/2), q = (3/4, 1/4), m = (5/8, 3/8)
    p, q = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])
    left = 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)
    right = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
    assert objective.agreement(p, q).item() == pytest.approx(1 - (left + right) / 2 / math.log(2), abs=1e-6)


def test_likeness_within_classes_by_hand():
    features = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    # Only images 0 and 3 share a class: the cosine of 45 degrees. Other classes' likeness does not count.
    assert objective.likeness_within_classes(features, LABELS).item() == pytest.approx(0.5**0.5)
    assert objective.likeness_within_classes(features, torch.arange(4)).item() == 0


def layer(scale, shift=3.0):
    values = [torch.tensor([x]) for x in (shift * scale, 4.0 * scale**2, 1.0 * scale, 1.0 * scale**2)]
    return LayerStatistics(*values, epsilon=0.0)


def test_statistics_distance_by_hand_and_without_a_unit():
    assert objective.statistics_distance([layer(1.0)]).item() == pytest.approx(4 + 1)
    assert objective.statistics_distance([layer(1.0), layer(100.0)]).item() == pytest.approx(5)


def test_the_first_layer_counts_more():
    # Distances 5 and 1.
    layers = [layer(1.0), layer(1.0, shift=1.0)]
    assert objective.statistics_distance(layers).item() == pytest.approx(3)
    assert objective.statistics_distance(layers, 10.0).item() == pytest.approx((10 * 5 + 1) / 11)


@pytest.mark.parametrize(
    ("term", "inputs"),
    [
        (lambda z: objective.cross_entropy(z, LABELS), [(4, 3)]),
        (lambda z: objective.margin(z, LABELS, 4.0), [(4, 3)]),
        (lambda z, f: objective.head_gradient(z, f, LABELS).square().sum(), [(4, 3), (4, 5)]),
        (lambda r: objective.augmented_lagrangian(r, torch.full((3, 5), 0.3), 2.0), [(3, 5)]),
        (objective.total_variation, [(2, 1, 4, 5)]),
        (objective.mean_square, [(2, 1, 4, 5)]),
        (objective.agreement, [(4, 3), (4, 3)]),
        (lambda f: objective.likeness_within_classes(f, LABELS), [(4, 5)]),
        (
            lambda m, v: objective.statistics_distance(
                [LayerStatistics(m, v.exp(), torch.ones(3), torch.full((3,), 2.0), 1e-5)] * 2, 3.0
            ),
            [(3,), (3,)],
        ),
    ],
)
def test_gradients_are_those_of_the_value(term, inputs):
    assert torch.autograd.gradcheck(term, [doubles(*shape, seed=i) for i, shape in enumerate(inputs)])


def view(**changes):
    generator = torch.Generator().manual_seed(1)
    given = {
        "images": torch.rand(4, 1, 6, 6, generator=generator), "labels": LABELS,
        "features": torch.rand(4, 5, generator=generator), "logits": torch.randn(4, 3, generator=generator),
        "last_logits": torch.randn(4, 3, generator=generator), "layers": [layer(1.0)],
    }  # fmt: skip
    return loss.View(**{**given, **changes})


def found(seen, **options):
    torch.manual_seed(3)
    head = nn.Linear(5, 3).requires_grad_(False)
    off = {"fit_weight": 0, "stationarity": 0, "batch_norm": 0, "total_variation": 0}
    return loss.terms(seen, head, torch.zeros(3, 5), SynthesisOptions(**{**off, **options}))


def test_terms_are_named_weighted_and_absent_at_weight_zero():
    assert {n for n, t in found(view(layers=[])).items() if t} == set()
    everything = {
        "fit_weight": 2, "stationarity": 3, "batch_norm": 0.5, "total_variation": 7, "l2": 11,
        "disagreement": 13, "diversity": 17,
    }  # fmt: skip
    whole = found(view(), **everything)
    assert set(whole) == {
        "cross_entropy", "stationarity", "batch_norm", "total_variation", "l2", "disagreement", "diversity",
    }  # fmt: skip
    assert whole["cross_entropy"].item() == pytest.approx(2 * F.cross_entropy(view().logits, LABELS).item())
    assert whole["batch_norm"].item() == pytest.approx(0.5 * 5)
    doubled = found(view(), **{name: 2 * weight for name, weight in everything.items()})
    assert all(doubled[name].item() == pytest.approx(2 * whole[name].item(), rel=1e-5) for name in whole)
    total = loss.total(whole, view().images)
    assert total.item() == pytest.approx(sum(t.item() for t in whole.values()), rel=1e-5)


def test_terms_without_what_they_need_are_left_out():
    assert "disagreement" not in found(view(last_logits=None), disagreement=1)
    assert "batch_norm" not in found(view(layers=[]), batch_norm=None)
    assert found(view(), batch_norm=None)["batch_norm"].item() == pytest.approx(0.1 * 5)
    assert set(found(view(layers=[]), fit="margin", fit_weight=1)) == {"margin"}


def test_no_term_at_all_is_a_loss_that_moves_nothing():
    images = torch.rand(1, 1, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss.total({}, images), [images])
    assert gradient.abs().sum() == 0
