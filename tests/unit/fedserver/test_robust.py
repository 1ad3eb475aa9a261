"""Robust rules as pure functions: tiny cases by hand, then what holds whatever the sites send."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedserver.robust.median import coordinate_median, middle_integer
from fedserver.robust.multi_krum import bearable, chosen, krum_scores
from fedserver.robust.norm_clip import clip_factors
from fedserver.robust.sorting import sorted_rows
from fedserver.robust.trimmed_mean import largest_kept_integer, trimmed_count, trimmed_mean

COLUMNS = torch.tensor([[1.0, 9.0], [5.0, 2.0], [3.0, 4.0], [100.0, -100.0]])


def columns(*, least: int = 1, most: int = 9):
    """Values [S, 3] of some sites, float32."""
    numbers = st.floats(-1e6, 1e6, width=32)
    rows = st.lists(st.tuples(numbers, numbers, numbers), min_size=least, max_size=most)
    return rows.map(lambda values: torch.tensor(values, dtype=torch.float32))


def test_median_by_hand():
    # Sorted: 1 3 5 100 and -100 2 4 9.
    assert coordinate_median(COLUMNS).tolist() == [4.0, 3.0]
    assert coordinate_median(COLUMNS[:3]).tolist() == [3.0, 4.0]
    assert middle_integer(torch.tensor([[7], [1], [9], [3]])).tolist() == [3]


def test_trimmed_mean_by_hand():
    assert trimmed_mean(COLUMNS, 1).tolist() == [4.0, 3.0]
    five = torch.tensor([[1.0], [2.0], [4.0], [6.0], [-1e9]])
    assert trimmed_mean(five, 1).tolist() == [pytest.approx(7 / 3)]
    assert trimmed_mean(five, 2).tolist() == [2.0]
    assert largest_kept_integer(torch.tensor([[7], [1], [9], [3]]), 1).tolist() == [7]


def test_as_much_is_trimmed_as_leaves_one():
    assert [trimmed_count(sites, 2) for sites in (1, 2, 3, 4, 5, 9)] == [0, 0, 1, 1, 2, 2]


def test_krum_scores_by_hand():
    # Points 0, 1, 2 and 10 on a line: with f = 1 the score is the squared distance to the nearest other one.
    points = torch.tensor([0.0, 1.0, 2.0, 10.0], dtype=torch.float64)
    squares = (points[:, None] - points[None, :]).square()
    assert krum_scores(squares, 1).tolist() == [1.0, 1.0, 1.0, 64.0]
    assert chosen(squares, 1) == [0, 1, 2]
    # f = 0: the two nearest.
    assert krum_scores(squares, 0).tolist() == [1.0 + 4.0, 1.0 + 1.0, 1.0 + 4.0, 64.0 + 81.0]
    assert chosen(squares, 0) == [0, 1, 2, 3]


def test_krum_bears_what_the_number_of_updates_allows():
    assert [bearable(sites, 2) for sites in (1, 4, 5, 6, 7, 20)] == [0, 0, 1, 1, 2, 2]
    assert chosen(torch.zeros((1, 1), dtype=torch.float64), 0) == [0]


def test_clip_factors_by_hand():
    assert clip_factors([1.0, 2.0, 3.0, 20.0], 1.0) == [1.0, 1.0, 2.5 / 3, 0.125]
    assert clip_factors([1.0, 2.0, 30.0], 2.0) == [1.0, 1.0, 4 / 30]
    assert clip_factors([0.0, 0.0, 5.0], 1.0) == [1.0, 1.0, 1.0]


@settings(deadline=None)
@given(columns(most=40))
def test_the_network_sorts(values_SE):
    assert torch.equal(torch.stack(sorted_rows(values_SE)), values_SE.sort(dim=0).values)


RULES = [coordinate_median, lambda values: trimmed_mean(values, 1), lambda values: trimmed_mean(values, 2)]


@pytest.mark.parametrize("rule", RULES)
@settings(deadline=None)
@given(columns(), st.randoms(use_true_random=False))
def test_rules_of_coordinates_know_no_order_and_stay_within_the_values(rule, values_SE, random):
    order = list(range(len(values_SE)))
    random.shuffle(order)
    merged = rule(values_SE)
    assert torch.allclose(rule(values_SE[order]), merged, rtol=1e-12, atol=0)
    assert bool((merged >= values_SE.min(0).values).all())
    assert bool((merged <= values_SE.max(0).values).all())


@pytest.mark.parametrize(("rule", "bad"), [(RULES[0], 2), (RULES[1], 1), (RULES[2], 2)])
@settings(deadline=None)
@given(columns(least=5), columns(least=2, most=2))
def test_so_many_bad_sites_move_no_coordinate_beyond_the_honest_ones(rule, bad, honest_SE, lies):
    poisoned = torch.cat([honest_SE, 1e30 * lies[:bad]])
    merged = rule(poisoned)
    assert bool((merged >= honest_SE.min(0).values).all())
    assert bool((merged <= honest_SE.max(0).values).all())


@settings(deadline=None)
@given(columns(least=7), st.lists(st.floats(1e9, 1e12), min_size=2, max_size=2), st.booleans())
def test_krum_never_chooses_updates_far_from_all_others(honest_SE, far, together):
    lies = torch.full((2, 3), 1.0, dtype=torch.float64) * torch.tensor(far, dtype=torch.float64)[:, None]
    if together:  # near each other, and still far from everybody else
        lies[1] = lies[0]
    points = torch.cat([honest_SE.double(), lies])
    squares = (points[:, None] - points[None, :]).square().sum(-1)
    assert chosen(squares, 2) == list(range(len(honest_SE)))


@settings(deadline=None)
@given(columns(least=5), st.randoms(use_true_random=False))
def test_krums_scores_follow_the_sites(values_SE, random):
    order = list(range(len(values_SE)))
    random.shuffle(order)
    squares = (values_SE.double()[:, None] - values_SE.double()[None, :]).square().sum(-1)
    moved = squares[order][:, order]
    assert torch.allclose(krum_scores(moved, 1), krum_scores(squares, 1)[order], rtol=1e-12)


@given(st.lists(st.just(0.0) | st.floats(1e-9, 1e9), min_size=1, max_size=9), st.floats(0.1, 10))
def test_no_clipped_update_is_longer_than_the_limit(norms, factor):
    factors = clip_factors(norms, factor)
    assert all(0 < f <= 1 for f in factors)
    middle = sorted(norms)[len(norms) // 2]
    if middle > 0 and len(norms) % 2:
        assert all(n * f <= factor * middle * (1 + 1e-12) for n, f in zip(norms, factors, strict=True))
        assert all(f == 1 for n, f in zip(norms, factors, strict=True) if n <= factor * middle)
    assert math.isfinite(sum(factors))
