import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import EmptyRoundError, LearningError
from fedcore.models.state_file import load_tensors, save_state
from fedserver import tensor_blocks
from fedserver.aggregation import merge_updates, normalised
from fedserver.strategies.base import MergeRequest, SiteReport, SiteUpdate


def by_examples(reports):
    return [float(r.num_examples) for r in reports]


def merge(folder, states, counts, *, model=None, local=(), weigh=by_examples, name="out"):
    """Merge states, {site: tensors}, in the order given; the global model is the first state unless given."""
    global_model = folder / "global"
    save_state(global_model, model or next(iter(states.values())))
    updates = []
    for (site, state), count in zip(states.items(), counts, strict=True):
        save_state(folder / site, state)
        updates.append(SiteUpdate(folder / site, SiteReport(site, count)))
    result = merge_updates(MergeRequest(7, global_model, updates, local, folder / name), weigh)
    return result, load_tensors(folder / name)


def test_mean_is_weighted_by_examples_as_computed_by_hand(tmp_path):
    states = {"a": {"w": torch.tensor([1.0, 2.0])}, "b": {"w": torch.tensor([5.0, 10.0])}}
    result, merged = merge(tmp_path, states, [1, 3])
    assert merged["w"].tolist() == [4.0, 8.0]
    assert result.accepted == ("a", "b")
    assert result.rejected == {}


def test_digest_is_that_of_the_file(tmp_path):
    states = {"a": {"w": torch.rand(3, 4), "n": torch.tensor(3)}}
    result, merged = merge(tmp_path, states, [5])
    assert result.digest == save_state(tmp_path / "again", merged)
    assert torch.equal(merged["w"], states["a"]["w"])


def test_integers_take_the_maximum(tmp_path):
    states = {s: {"bn.num_batches_tracked": torch.tensor(n)} for s, n in (("a", 3), ("b", 11), ("c", 7))}
    _, merged = merge(tmp_path, states, [1, 1, 1])
    assert merged["bn.num_batches_tracked"].item() == 11


def test_variance_is_that_of_the_pooled_samples(tmp_path):
    rng = np.random.default_rng(0)
    samples = {
        "a": rng.normal(0, 1, (400, 3)),
        "b": rng.normal(5, 2, (100, 3)),
        "c": rng.normal(-3, 0.5, (250, 3)),
    }
    states = {
        site: {
            "bn.running_mean": torch.tensor(x.mean(0), dtype=torch.float32),
            "bn.running_var": torch.tensor(x.var(0), dtype=torch.float32),
        }
        for site, x in samples.items()
    }
    _, merged = merge(tmp_path, states, [len(x) for x in samples.values()])
    pooled = np.concatenate(list(samples.values()))
    np.testing.assert_allclose(merged["bn.running_mean"].numpy(), pooled.mean(0), rtol=1e-5)
    np.testing.assert_allclose(merged["bn.running_var"].numpy(), pooled.var(0), rtol=1e-5)


def test_a_variance_without_a_mean_is_averaged_plainly(tmp_path):
    states = {"a": {"x.running_var": torch.tensor([1.0])}, "b": {"x.running_var": torch.tensor([3.0])}}
    _, merged = merge(tmp_path, states, [1, 1])
    assert merged["x.running_var"].tolist() == [2.0]


def test_local_tensors_come_from_the_global_model(tmp_path):
    model = {"w": torch.zeros(2), "norm": torch.tensor([9.0])}
    states = {"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(2) * 3}}
    _, merged = merge(tmp_path, states, [1, 1], model=model, local=["norm"])
    assert merged["w"].tolist() == [2.0, 2.0]
    assert merged["norm"].tolist() == [9.0]


def test_tensors_longer_than_a_block_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_blocks, "BLOCK", 8)
    states = {s: {"w": torch.rand(5, 7), "b": torch.rand(8), "e": torch.empty(0)} for s in "ab"}
    _, merged = merge(tmp_path, states, [1, 1])
    expected = (states["a"]["w"].double() * 0.5 + states["b"]["w"].double() * 0.5).float()
    assert torch.equal(merged["w"], expected)
    assert merged["e"].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_return_to_their_own(tmp_path, dtype):
    states = {"a": {"w": torch.tensor([1.0], dtype=dtype)}, "b": {"w": torch.tensor([2.0], dtype=dtype)}}
    _, merged = merge(tmp_path, states, [1, 1])
    assert merged["w"].dtype == dtype
    assert merged["w"].item() == 1.5


finite = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.tuples(finite, finite), min_size=1, max_size=5),
    counts=st.lists(st.integers(1, 10_000), min_size=5, max_size=5),
)
def test_mean_lies_within_the_sites_values_and_matches_numpy(tmp_path_factory, values, counts):
    folder = tmp_path_factory.mktemp("merge")
    states = {f"s{i}": {"w": torch.tensor(v, dtype=torch.float32)} for i, v in enumerate(values)}
    _, merged = merge(folder, states, counts[: len(values)])
    array = np.array(values, dtype=np.float64)
    expected = np.average(array, axis=0, weights=counts[: len(values)])
    np.testing.assert_allclose(merged["w"].numpy(), expected, rtol=1e-6, atol=1e-6)
    assert (merged["w"].numpy() <= array.max(0) + 1e-6).all()
    assert (merged["w"].numpy() >= array.min(0) - 1e-6).all()


def test_repeating_a_merge_gives_the_same_bytes(tmp_path):
    states = {s: {"w": torch.randn(1000), "bn.running_mean": torch.randn(9)} for s in "abcd"}
    first, _ = merge(tmp_path, states, [3, 1, 4, 1])
    second, _ = merge(tmp_path, states, [3, 1, 4, 1], name="other")
    assert first.digest == second.digest


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=20).filter(lambda w: math.fsum(w) > 1e-6))
def test_weights_sum_to_one(weights):
    shares = normalised(weights)
    assert math.fsum(shares) == pytest.approx(1)
    assert all(s >= 0 for s in shares)


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [float("nan"), 1.0], [float("inf")], []])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(LearningError, match="weights"):
        normalised(weights, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 99_999])
def test_a_site_with_nan_or_inf_is_left_out_with_the_reason(tmp_path, bad, where):
    good = {"w": torch.ones(100_000), "v": torch.ones(3)}
    poisoned = {"w": torch.ones(100_000), "v": torch.ones(3)}
    poisoned["w"][where] = bad
    result, merged = merge(tmp_path, {"a": good, "b": poisoned, "c": good}, [1, 1, 1])
    assert result.accepted == ("a", "c")
    assert "b round 7: tensor 'w' holds NaN or Inf" in result.rejected["b"]
    assert torch.equal(merged["w"], good["w"])


def test_infinities_that_cancel_are_found(tmp_path):
    states = {"a": {"w": torch.tensor([torch.inf])}, "b": {"w": torch.tensor([-torch.inf])}}
    with pytest.raises(EmptyRoundError, match=r"a round 7.*b round 7"):
        merge(tmp_path, states, [1, 1])


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        ({"w": torch.ones(3), "bn.running_var": torch.ones(2)}, "shape"),
        ({"w": torch.ones(2, dtype=torch.float64), "bn.running_var": torch.ones(2)}, "dtype"),
        ({"w": torch.ones(2)}, "missing"),
        ({"w": torch.ones(2), "bn.running_var": torch.ones(2), "x": torch.ones(1)}, "not expected"),
        ({"w": torch.ones(2), "bn.running_var": torch.tensor([1.0, -1e-3])}, "negative variance"),
    ],
)
def test_a_site_whose_tensors_are_not_the_models_is_left_out(tmp_path, update, reason):
    good = {"w": torch.ones(2), "bn.running_var": torch.ones(2)}
    result, _ = merge(tmp_path, {"a": good, "b": update}, [1, 1])
    assert result.accepted == ("a",)
    assert reason in result.rejected["b"]
    assert result.rejected["b"].startswith("b round 7")


def test_a_damaged_file_and_a_site_without_images_are_left_out(tmp_path):
    good = {"w": torch.ones(2)}
    save_state(tmp_path / "global", good)
    for name in "abc":
        save_state(tmp_path / name, good)
    (tmp_path / "b").write_bytes((tmp_path / "b").read_bytes()[:-1])
    updates = [SiteUpdate(tmp_path / s, SiteReport(s, n)) for s, n in (("a", 5), ("b", 5), ("c", 0))]
    request = MergeRequest(1, tmp_path / "global", updates, (), tmp_path / "out")
    result = merge_updates(request, by_examples)
    assert result.accepted == ("a",)
    assert set(result.rejected) == {"b", "c"}
    assert "0 images" in result.rejected["c"]


def test_nothing_to_merge_is_an_empty_round(tmp_path):
    save_state(tmp_path / "global", {"w": torch.ones(1)})
    with pytest.raises(EmptyRoundError, match="no site delivered"):
        merge_updates(MergeRequest(1, tmp_path / "global", [], (), tmp_path / "out"), by_examples)


def test_sound_updates_that_overflow_blame_no_site(tmp_path):
    states = {
        s: {"bn.running_mean": torch.tensor([m]), "bn.running_var": torch.ones(1)}
        for s, m in (("a", 3e38), ("b", -3e38))
    }
    with pytest.raises(LearningError, match=r"running_var.*overflows"):
        merge(tmp_path, states, [1, 1])


def test_the_order_of_sites_is_the_callers_alone(tmp_path):
    """Sums follow the order given; whoever lists sites in the same order gets the same bits."""
    states = {s: {"w": torch.randn(64) * 10.0**i} for i, s in enumerate("abc")}
    digests = set()
    for arrival in itertools.permutations("abc"):
        for site in arrival:  # files appear in the order of arrival
            save_state(tmp_path / site, states[site])
        save_state(tmp_path / "global", states["a"])
        updates = [
            SiteUpdate(tmp_path / s, SiteReport(s, n)) for s, n in zip("abc", (7, 11, 13), strict=True)
        ]
        request = MergeRequest(1, tmp_path / "global", updates, (), tmp_path / "out")
        digests.add(merge_updates(request, by_examples).digest)
    assert len(digests) == 1
