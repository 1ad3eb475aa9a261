"""Logit adjustment by hand."""

import pytest
import torch
import torch.nn.functional as F

from fedagent.objectives.logit_adjustment import (
    SMOOTHING,
    adjusted_cross_entropy,
    adjusted_logits,
    adjusted_where_real,
    log_prior,
)

LOGITS = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
COUNTS = torch.tensor([60.0, 30.0, 10.0])


def test_the_prior_is_the_share_and_finite_for_what_is_absent():
    assert log_prior(COUNTS).exp().tolist() == pytest.approx([0.6, 0.3, 0.1])
    absent = log_prior(torch.tensor([9.9, 0.0]))
    assert absent.exp().tolist() == pytest.approx([0.99, SMOOTHING / 10])


def test_balanced_softmax_by_hand():
    found = adjusted_cross_entropy(LOGITS, torch.tensor([2, 0]), COUNTS, 1.0)
    weights = COUNTS * LOGITS.exp()
    shares = weights / weights.sum(1, keepdim=True)
    assert found.item() == pytest.approx(-(shares[0, 2].log() + shares[1, 0].log()).item() / 2)


def test_tau_scales_and_zero_leaves():
    half = adjusted_logits(LOGITS, COUNTS, 0.5) - LOGITS
    assert torch.allclose(half, 0.5 * torch.tensor([0.6, 0.3, 0.1]).log().expand(2, 3))
    assert torch.equal(adjusted_logits(LOGITS, COUNTS, 0.0), LOGITS)


def test_absent_classes_are_not_pushed_down():
    logits = torch.zeros(4, 2, requires_grad=True)
    labels, counts = torch.zeros(4, dtype=torch.int64), torch.tensor([100.0, 0.0])
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, labels), [logits])
    (adjusted,) = torch.autograd.grad(adjusted_cross_entropy(logits, labels, counts, 1.0), [logits])
    assert adjusted[:, 1].sum() < 0.01 * plain[:, 1].sum()


def test_impressions_are_not_adjusted():
    found = adjusted_where_real(LOGITS, torch.tensor([False, True]), COUNTS, 1.0)
    assert torch.equal(found[0], adjusted_logits(LOGITS, COUNTS, 1.0)[0])
    assert torch.equal(found[1], LOGITS[1])
