"""Scores by hand, and scores of several sites against the score of their pooled images."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedcore.compute_worker import Cancelled
from fedcore.data import LabelledImages
from fedcore.evaluation import SplitMetrics, accuracy, balanced_accuracy, evaluate, pool, recalls
from fedcore.models import build_model
from fedcore.plan import Plan

torch.set_num_threads(1)

PLAN = Plan.model_validate(
    {"name": "e", "rounds": 1, "model": {"name": "cnn", "classes": 3, "input": [1, 8, 8]}}
)


class Brightness(nn.Module):
    """Says class 0, 1 or 2 for dark, middle and bright images."""

    def forward(self, images: Tensor) -> Tensor:
        level = images.mean(dim=(1, 2, 3))
        return -10 * (level[:, None] - torch.tensor([-1.0, 0.0, 1.0])).abs()


def images(levels: list[int], labels: list[int]) -> LabelledImages:
    pixels = np.broadcast_to(np.array(levels, dtype=np.uint8)[:, None, None, None], (len(levels), 8, 8, 1))
    return LabelledImages(np.ascontiguousarray(pixels), np.array(labels, dtype=np.int64))


def test_counts_by_hand() -> None:
    metrics = evaluate(
        Brightness(), images([0, 0, 128, 255], [0, 1, 1, 2]), PLAN, "cpu", batch_size=3, per_class=True
    )
    assert (metrics.num_examples, metrics.num_correct) == (4, 3)
    assert metrics.class_totals == (1, 2, 1)
    assert metrics.class_correct == (1, 1, 1)
    assert accuracy(metrics) == 0.75
    assert balanced_accuracy(metrics) == pytest.approx((1 + 0.5 + 1) / 3)
    # The dark image called 1 has logits 0, -10, -20.
    wrong = 10 + math.log(1 + math.exp(-10) + math.exp(-20))
    assert metrics.loss_sum == pytest.approx(wrong, abs=0.01)


def test_pooled_scores_are_those_of_pooled_images() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = build_model(PLAN.model)
    whole = LabelledImages(rng.integers(0, 256, (50, 8, 8, 1), dtype=np.uint8), rng.integers(0, 3, 50))
    parts = [whole.take(np.arange(17)), whole.take(np.arange(17, 50)), whole.take(np.arange(0))]
    together = evaluate(model, whole, PLAN, "cpu", per_class=True)
    added = pool([evaluate(model, part, PLAN, "cpu", per_class=True) for part in parts])
    assert added.num_correct == together.num_correct
    assert added.class_totals == together.class_totals
    assert added.loss_sum == pytest.approx(together.loss_sum, rel=1e-5)


def test_training_mode_and_statistics_are_left_as_they_were() -> None:
    model = build_model(PLAN.model).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, images([3, 200], [0, 2]), PLAN, "cpu")
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    model.eval()
    evaluate(model, images([3], [0]), PLAN, "cpu")
    assert not model.training


def test_a_withdrawn_evaluation_stops_and_restores_the_mode() -> None:
    model = build_model(PLAN.model).train()

    def check() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        evaluate(model, images([3], [0]), PLAN, "cpu", check=check)
    assert model.training


def test_no_images_have_no_accuracy() -> None:
    nothing = evaluate(Brightness(), images([], []), PLAN, "cpu", per_class=True)
    assert nothing.num_examples == 0
    assert accuracy(nothing) is None
    assert balanced_accuracy(nothing) is None
    assert pool([]) == SplitMetrics(0, 0, 0.0)


def test_one_site_that_keeps_its_counts_private_hides_the_pooled_ones() -> None:
    open_site = SplitMetrics(3, 2, 1.0, (2, 1, 0), (1, 1, 0))
    private = SplitMetrics(2, 1, 0.5)
    pooled = pool([open_site, private])
    assert (pooled.num_examples, pooled.num_correct, pooled.loss_sum) == (5, 3, 1.5)
    assert pooled.class_totals == ()
    assert balanced_accuracy(pooled) is None
    assert recalls(open_site) == [0.5, 1.0, None]
    assert pool([open_site, SplitMetrics(0, 0, 0.0)]).class_totals == (2, 1, 0)
