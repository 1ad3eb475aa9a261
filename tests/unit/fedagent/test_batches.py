"""Which impressions a batch holds: water poured over a site's class shares, turns of a sampler."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedagent.batches import ImpressionSampler, impressions_in_batch
from fedagent.objectives.sampling import impression_weights, lack


def sampler(weights, seed=0, size=None):
    weights = None if weights is None else torch.tensor(weights)
    return ImpressionSampler(size or len(weights), torch.Generator().manual_seed(seed), weights)


def test_lack_by_hand():
    # Shares .75, .25, 0, 0: one impression to an image fills the three lower ones up to 5/12.
    expected = [0, 5 / 12 - 1 / 4, 5 / 12, 5 / 12]
    assert lack(torch.tensor([30.0, 10.0, 0.0, 0.0]), 1.0).tolist() == pytest.approx(expected)
    # Few impressions go to the emptiest alone; many make everything even.
    assert lack(torch.tensor([30.0, 10.0, 0.0, 0.0]), 0.25).tolist() == pytest.approx([0, 0, 0.5, 0.5])
    even = lack(torch.tensor([30.0, 10.0, 0.0, 0.0]), 16.0)
    assert (torch.tensor([0.75, 0.25, 0, 0]) + 16 * even).tolist() == pytest.approx([17 / 4] * 4)
    assert lack(torch.zeros(3), 1.0).tolist() == pytest.approx([1 / 3] * 3)


@given(
    counts=st.lists(st.integers(0, 500), min_size=2, max_size=12),
    ratio=st.floats(0.05, 16),
)
def test_lack_is_a_distribution_that_evens_out(counts, ratio):
    counts = torch.tensor(counts, dtype=torch.float32)
    shares = lack(counts, ratio)
    assert (shares >= 0).all()
    assert shares.sum().item() == pytest.approx(1)
    own = counts.double() / counts.double().sum().clamp_min(1e-12)
    total = own + ratio * shares
    # Who gets any gets up to one level, and nobody who gets none is below it.
    level = total[shares > 1e-9]
    assert level.max() - level.min() < 1e-6
    assert (total >= level.min() - 1e-6).all()


def test_a_classes_share_is_split_among_its_impressions():
    labels = torch.tensor([0, 0, 1, 2, 2, 2, 2])
    weights = impression_weights(labels, torch.tensor([30.0, 10.0, 0.0]), "lack", 1.0)
    shares = lack(torch.tensor([30.0, 10.0, 0.0]), 1.0)
    assert weights[:2].tolist() == [0, 0]
    assert weights[2].item() == pytest.approx(shares[1].item())
    assert weights[3:].tolist() == pytest.approx([shares[2].item() / 4] * 4)
    assert impression_weights(labels, torch.tensor([30.0, 10.0, 0.0]), "uniform", 1.0) is None


def test_a_bank_without_the_lacking_classes_is_drawn_alike():
    assert impression_weights(torch.tensor([0, 0]), torch.tensor([30.0, 0.0]), "lack", 1.0) is None


def test_weights_are_kept_in_every_turn():
    found = sampler([1.0, 2.0, 0.0, 5.0]).draw(4000)
    assert torch.bincount(found, minlength=4).tolist() == pytest.approx([500, 1000, 0, 2500], abs=40)


def test_no_impression_comes_twice_in_a_turn_without_weights():
    drawn = sampler(None, size=5)
    assert sorted(drawn.draw(5).tolist()) == [0, 1, 2, 3, 4]
    assert drawn.num_distinct == 5


@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=20).filter(lambda w: sum(w) > 0.1),
    counts=st.lists(st.integers(0, 30), max_size=6),
    seed=st.integers(0, 3),
)
def test_draws_are_repeatable_as_many_as_asked_and_never_of_weight_zero(weights, counts, seed):
    first, second = sampler(weights, seed), sampler(weights, seed)
    seen = set()
    for count in counts:
        drawn = first.draw(count)
        assert torch.equal(drawn, second.draw(count))
        assert len(drawn) == count
        assert all(weights[i] > 0 for i in drawn.tolist())
        seen |= set(drawn.tolist())
    assert first.num_distinct == len(seen)


@pytest.mark.parametrize(
    ("real", "ratio", "expected"), [(32, 1.0, 32), (7, 0.5, 4), (2, 0.1, 1), (8, 0.0, 0), (3, 5.0, 15)]
)
def test_impressions_beside_real_images(real, ratio, expected):
    assert impressions_in_batch(real, ratio) == expected
