"""Robust rules over files, as the coordinator merges them: parameters, BatchNorm, counters, what strategies add."""

import pytest
import torch

from fedcore.models.state_file import load_tensors, save_state
from fedcore.plan_robustness import (
    MeanRule,
    MedianRule,
    MultiKrumRule,
    NormClipRule,
    TrimmedMeanRule,
)
from fedcore.tensor_file import TensorSpec
from fedserver import tensor_blocks
from fedserver.aggregation import merge_updates
from fedserver.robust import norms
from fedserver.strategies.base import MergeRequest, SiteReport, SiteUpdate
from fedserver.tensor_source import TensorFile

RULES = [
    MeanRule(),
    MedianRule(rule="median"),
    TrimmedMeanRule(rule="trimmed_mean", tolerate=1),
    MultiKrumRule(rule="multi_krum", tolerate=1),
    NormClipRule(rule="norm_clip"),
]


def state(w, mean=0.0, var=1.0, seen=1, aux=None):
    tensors = {
        "w": torch.tensor(w, dtype=torch.float32),
        "bn.running_mean": torch.tensor([float(mean)]),
        "bn.running_var": torch.tensor([float(var)]),
        "bn.num_batches_tracked": torch.tensor(seen),
    }
    return tensors if aux is None else tensors | {"aux/variate/w": torch.tensor(aux, dtype=torch.float32)}


def merge(folder, rule, updates, *, counts=None, start=None, extras=False):
    save_state(folder / "global", start or state([0.0, 0.0]))
    listed = []
    for index, update in enumerate(updates):
        save_state(folder / f"s{index}", update)
        count = counts[index] if counts else 10
        listed.append(SiteUpdate(folder / f"s{index}", SiteReport(f"s{index}", count)))
    specs = [TensorSpec("aux/variate/w", "F32", (2,))] if extras else []
    request = MergeRequest(
        1, folder / "global", listed, (), folder / "out", extras=specs, parameters=frozenset({"w"}), rule=rule
    )
    result = merge_updates(
        request, lambda reports: [float(r.num_examples) for r in reports], extras_out=folder / "extras"
    )
    assert result.digest == save_state(folder / "again", load_tensors(folder / "out"))
    return result, load_tensors(folder / "out")


def test_median_and_trimmed_mean_count_every_site_the_same(tmp_path):
    updates = [state([1, 9]), state([2, 8]), state([6, 7]), state([1e6, -1e6])]
    result, merged = merge(tmp_path, RULES[1], updates, counts=[1, 1, 1, 10**9])
    assert merged["w"].tolist() == [4.0, 7.5]
    assert result.accepted == ("s0", "s1", "s2", "s3")
    assert (result.figures.rule, result.figures.tolerated, result.figures.weights) == ("median", None, {})
    result, merged = merge(tmp_path, RULES[2], updates, counts=[1, 1, 1, 10**9])
    assert merged["w"].tolist() == [4.0, 7.5]
    assert result.figures.tolerated == 1


def test_multi_krum_averages_the_updates_near_each_other_by_their_weights(tmp_path):
    updates = [
        state([1, 1]),
        state([2, 2]),
        state([3, 3]),
        state([2, 2]),
        state([50, -50], mean=1e6, seen=9999),
    ]
    result, merged = merge(tmp_path, RULES[3], updates, counts=[10, 10, 20, 10, 10**6])
    assert merged["w"].tolist() == [pytest.approx(2.2)] * 2
    assert merged["bn.running_mean"].item() == 0.0
    assert merged["bn.num_batches_tracked"].item() == 1
    assert result.figures.weights == pytest.approx({"s0": 0.2, "s1": 0.2, "s2": 0.4, "s3": 0.2, "s4": 0})
    assert result.figures.tolerated == 1


def test_norm_clip_shortens_towards_the_model_before(tmp_path):
    start = state([1.0, 1.0])
    # Lengths 5, 5, 50: the third counts for a tenth of its way.
    updates = [state([4, 5]), state([4, 5]), state([31, 41])]
    result, merged = merge(tmp_path, RULES[4], updates, start=start)
    assert merged["w"].tolist() == [pytest.approx(4.0), pytest.approx(5.0)]
    assert result.figures.weights == {"s0": 1 / 3, "s1": 1 / 3, "s2": pytest.approx(1 / 30)}


def test_what_the_gate_shortened_is_merged_as_if_it_had_moved_less(tmp_path):
    start = state([1.0, 1.0], mean=0, seen=1)
    save_state(tmp_path / "global", start)
    save_state(tmp_path / "far", state([31, 41], mean=4, var=3, seen=9, aux=[8, 4]))
    save_state(tmp_path / "near", state([4, 5], mean=0, var=3, seen=4, aux=[1, 1]))
    updates = [
        SiteUpdate(tmp_path / "far", SiteReport("far", 10), kept={"parameters": 0.1, "aux/variate": 0.25}),
        SiteUpdate(tmp_path / "near", SiteReport("near", 10)),
    ]
    merge_updates(
        MergeRequest(
            1, tmp_path / "global", updates, (), tmp_path / "out", parameters=frozenset({"w"}),
            extras=[TensorSpec("aux/variate/w", "F32", (2,))],
        ),
        lambda reports: [1.0, 1.0],
        extras_out=tmp_path / "extras",
    )  # fmt: skip
    merged = load_tensors(tmp_path / "out")
    assert merged["w"].tolist() == [4.0, 5.0]
    # Statistics and counters are measurements: the spread of the means, 4, is in the variance.
    assert [merged[f"bn.{name}"].item() for name in ("running_mean", "running_var", "num_batches_tracked")] == [
        2.0, 7.0, 9,
    ]  # fmt: skip
    assert load_tensors(tmp_path / "extras")["aux/variate/w"].tolist() == [1.5, 1.0]


def test_nothing_is_clipped_of_updates_of_one_length(tmp_path):
    updates = [state([3, 4]), state([4, 3]), state([5, 0])]
    _, clipped = merge(tmp_path, RULES[4], updates, counts=[1, 2, 4])
    _, mean = merge(tmp_path, RULES[0], updates, counts=[1, 2, 4])
    assert torch.equal(clipped["w"], mean["w"])


def test_the_spread_of_means_is_in_the_variance_under_every_rule(tmp_path):
    """Means -1 and 1 (twice each) with variance 2: three of the pool. The same under every rule."""
    updates = [state([1, 1], mean=m, var=2.0) for m in (-1, 1, -1, 1)]
    for rule in (RULES[0], RULES[1], RULES[2]):
        _, merged = merge(tmp_path, rule, updates)
        assert merged["bn.running_mean"].item() == 0.0
        assert merged["bn.running_var"].item() == 3.0


def test_statistics_of_one_bad_site_do_not_get_through(tmp_path):
    honest = [state([1, 1], mean=m, var=1.0, seen=s) for m, s in ((0.0, 5), (0.1, 6), (-0.1, 7), (0.0, 8))]
    bad = state([1, 1], mean=1e9, var=1e18, seen=2**60)
    for rule in (RULES[1], RULES[2]):
        _, merged = merge(tmp_path, rule, [*honest, bad])
        assert abs(merged["bn.running_mean"].item()) <= 0.1
        assert 0.9 < merged["bn.running_var"].item() < 1.1
        assert merged["bn.num_batches_tracked"].item() in (7, 8)
    _, merged = merge(tmp_path, RULES[4], [*honest, bad])
    # Shortened to the median length of the statistics' changes, a bad site is one of five.
    assert abs(merged["bn.running_mean"].item()) < 0.1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.rule)
def test_what_strategies_add_follows_the_rule(tmp_path, rule):
    updates = [state([1, 1], aux=[2, 2]) for _ in range(4)] + [state([1, 1], aux=[2, 2])]
    merge(tmp_path, rule, updates, extras=True)
    assert load_tensors(tmp_path / "extras")["aux/variate/w"].tolist() == [2.0, 2.0]
    if rule.rule in ("median", "trimmed_mean", "norm_clip"):
        updates[-1] = state([1, 1], aux=[1e9, 1e9])
        merge(tmp_path, rule, updates, extras=True)
        assert load_tensors(tmp_path / "extras")["aux/variate/w"].tolist() == [pytest.approx(2.0)] * 2


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.rule)
def test_blocks_change_no_bit_and_a_repetition_gives_the_same(tmp_path, rule, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    updates = [
        {"w": torch.randn(5, 7, generator=generator), "e": torch.empty(0), "n": torch.tensor([3, 1])}
        for _ in range(6)
    ]
    start = {"w": torch.zeros(5, 7), "e": torch.empty(0), "n": torch.tensor([0, 0])}
    whole, _ = merge(tmp_path, rule, updates, start=start)
    monkeypatch.setattr(norms, "_SIDE_BY_SIDE", 48)
    monkeypatch.setattr(tensor_blocks, "BLOCK", 64)
    blocked, _ = merge(tmp_path, rule, updates, start=start)
    assert blocked.digest == whole.digest


def test_norms_and_distances_by_hand(tmp_path):
    save_state(tmp_path / "global", state([1.0, 1.0], mean=1.0))
    save_state(tmp_path / "a", state([4.0, 5.0], mean=3.0, aux=[6, 8]))
    save_state(tmp_path / "b", state([1.0, 1.0], mean=99.0, aux=[0, 0]))
    model, a, b = (TensorFile.open(tmp_path / name) for name in ("global", "a", "b"))
    assert norms.update_norms(model, a, {"w"}) == {"parameters": 5.0, "statistics": 2.0, "aux/variate": 10.0}
    assert norms.squared_distances([a, b, a], {"w"}).tolist() == [[0, 25, 0], [25, 0, 25], [0, 25, 0]]
