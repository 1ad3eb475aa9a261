"""Splits over sites are true partitions; benchmark federations can be had again from their record."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.data import open_dataset, partition
from fedcore.data.benchmark_sets import load_benchmark, load_recorded, partition_record, write_site
from fedcore.data.dataset import IndexArray, LabelArray
from fedcore.data.splits import apportion, cut_held_out, stratified_sample
from fedcore.errors import DataError
from fedcore.plan import Plan

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
Splitter = Callable[[LabelArray, int, int], list[IndexArray]]
MIN_SIZE = 3
SPLITTERS: dict[str, Splitter] = {
    "iid": lambda labels, sites, seed: partition.iid(labels, sites, seed=seed),
    "dirichlet 0.01": lambda labels, sites, seed: partition.dirichlet(
        labels, sites, 0.01, seed=seed, min_size=MIN_SIZE
    ),
    "dirichlet 1": lambda labels, sites, seed: partition.dirichlet(
        labels, sites, 1.0, seed=seed, min_size=MIN_SIZE
    ),
    "shards": lambda labels, sites, seed: partition.shards(labels, sites, seed=seed),
    "quantity": lambda labels, sites, seed: partition.quantity_skew(
        labels, sites, 0.3, seed=seed, min_size=MIN_SIZE
    ),
}


@pytest.mark.parametrize("name", SPLITTERS)
@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.integers(0, 5), min_size=24, max_size=150),
    sites=st.integers(1, 8),
    seed=st.integers(0, 2**62),
)
def test_every_image_goes_to_exactly_one_site(name: str, labels: list[int], sites: int, seed: int) -> None:
    array = np.array(labels, dtype=np.int64)
    parts = SPLITTERS[name](array, sites, seed)
    assert len(parts) == sites
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert min(map(len, parts)) >= (2 if name == "shards" else MIN_SIZE)
    again = SPLITTERS[name](array, sites, seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_a_small_alpha_skews_labels_and_a_large_one_does_not() -> None:
    labels = np.repeat(np.arange(8), 200).astype(np.int64)

    def share_of_commonest(alpha: float) -> float:
        parts = partition.dirichlet(labels, 6, alpha, seed=4)
        return float(np.mean([np.bincount(labels[p]).max() / len(p) for p in parts]))

    assert share_of_commonest(0.05) > 0.4
    assert share_of_commonest(100.0) < 0.2


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), max_size=80),
    counts=st.lists(st.lists(st.integers(0, 50), min_size=5, max_size=5), min_size=1, max_size=5),
)
def test_a_pooled_set_is_dealt_in_training_proportions(labels: list[int], counts: list[list[int]]) -> None:
    array = np.array(labels, dtype=np.int64)
    parts = partition.proportional_split(array, counts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    trained = np.array(counts)
    for k in range(5):
        held = int((array == k).sum())
        for site, part in enumerate(parts):
            if trained[:, k].any():
                exact = held * trained[site, k] / trained[:, k].sum()
                assert abs(int((array[part] == k).sum()) - exact) < 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda y: partition.iid(y, 0, seed=0), "0 sites"),
        (
            lambda y: partition.dirichlet(y, 3, 0.1, seed=0),
            "20 images are too few for 3 sites of at least 10",
        ),
        (lambda y: partition.dirichlet(y, 2, 0.0, seed=0), "alpha is 0.0"),
        (lambda y: partition.shards(y, 11, seed=0), "too few"),
        (lambda y: partition.proportional_split(y, [[1]]), "label 1, expected 0..0"),
    ],
)
def test_impossible_splits_are_refused(call: Callable[[LabelArray], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call(np.array([0, 1] * 10, dtype=np.int64))


def test_apportion_by_hand() -> None:
    assert apportion(np.array([1, 1, 1]), 10).tolist() == [4, 3, 3]
    assert apportion(np.array([5, 3, 2]), 7).tolist() == [4, 2, 1]
    assert apportion(np.array([0, 0]), 3).tolist() == [2, 1]


@settings(max_examples=40, deadline=None)
@given(labels=st.lists(st.sampled_from("abc"), min_size=1, max_size=120))
def test_held_out_images_are_disjoint_stratified_and_always_the_same(labels: list[str]) -> None:
    cut = cut_held_out(labels, validation_fraction=0.1, test_fraction=0.2)
    assert sorted(np.concatenate(list(cut.values())).tolist()) == list(range(len(labels)))
    assert set(labels) == {labels[n] for n in cut["train"]}
    for name in set(labels):
        total = labels.count(name)
        assert abs(sum(labels[n] == name for n in cut["test"]) - 0.2 * total) <= 1.5
    again = cut_held_out(labels, validation_fraction=0.1, test_fraction=0.2)
    assert all(np.array_equal(cut[s], again[s]) for s in cut)


def test_stratified_sample_keeps_one_of_each_class_back() -> None:
    labels = np.array([0] * 9 + [1], dtype=np.int64)
    drawn = stratified_sample(labels, 10, np.random.default_rng(0))
    assert len(drawn) == 8
    assert 9 not in drawn


def test_digits_are_dealt_written_and_read_back(tmp_path: Path) -> None:
    federation = load_benchmark("digits", sites=3, alpha=0.1, seed=1)
    assert federation.input == (1, 8, 8)
    assert list(federation.sites) == ["site-1", "site-2", "site-3"]
    assert sum(len(s.train) + len(s.validation) + len(s.test) for s in federation.sites.values()) == 1797
    assert len(federation.pooled_test) == 359
    assert max(int(s.train.images.max()) for s in federation.sites.values()) == 255
    site = federation.sites["site-2"]
    write_site(site, tmp_path / "two.npz")
    plan = Plan.model_validate(
        {"name": "d", "rounds": 1, "model": {"name": "cnn", "classes": 10, "input": federation.input}}
    )
    reader = open_dataset("npz", tmp_path / "two.npz")
    assert reader.summarise().num_examples == len(site.train)
    data = reader.read(plan)
    for read, written in (
        (data.train, site.train),
        (data.validation, site.validation),
        (data.test, site.test),
    ):
        assert np.array_equal(read.images, written.images)
        assert np.array_equal(read.labels, written.labels)


def test_a_recorded_split_comes_back_and_another_seed_does_not_pass_for_it() -> None:
    federation = load_benchmark("digits", sites=3, alpha=0.1, seed=2, max_train=500)
    assert sum(len(s.train) for s in federation.sites.values()) == 500
    record = json.loads(json.dumps(partition_record(federation)))
    assert sum(record["sites"]["site-1"]["class_counts"]) == record["sites"]["site-1"]["train"]
    again = load_recorded(record)
    assert np.array_equal(again.sites["site-3"].test.images, federation.sites["site-3"].test.images)
    # A record of an older version has no indices: its split is dealt again.
    for site in record["sites"].values():
        del site["indices"]
    dealt = load_recorded({key: record[key] for key in record if key not in ("partition", "data_sha256")})
    assert np.array_equal(dealt.sites["site-3"].test.images, federation.sites["site-3"].test.images)
    with pytest.raises(DataError, match="site-1 is not as recorded"):
        load_recorded({**record, "seed": 3})


def test_blood_cells_or_an_npz_in_their_place(tmp_path: Path) -> None:
    path = SHARED / "bloodmnist_rebuilt.npz"
    if path.exists():
        federation = load_benchmark("bloodmnist", path, sites=8, alpha=0.1, seed=0)
        assert federation.description == "rebuilt BloodMNIST, own split"
        assert federation.class_names[3] == "immature granulocyte"
        assert (len(federation.pooled_test), federation.input) == (3421, (3, 28, 28))
        assert sum(len(s.train) for s in federation.sites.values()) == 11_959
        return
    write_site(load_benchmark("digits", sites=1).sites["site-1"], tmp_path / "one.npz")
    federation = load_benchmark(str(tmp_path / "one.npz"), sites=2)
    assert (len(federation.pooled_test), federation.method) == (359, "iid")


def test_real_sites_are_redrawn_per_seed_from_each_sites_own_images(tmp_path: Path) -> None:
    path = SHARED / "wbc_multisite_28.npz"
    if not path.exists():
        path = tmp_path / "sites.npz"
        rng = np.random.default_rng(0)
        arrays = {}
        for site in ("pbc", "tecom", "cellavision", "bccd"):
            for half, count in (("train", 700), ("test", 100)):
                arrays[f"{site}_{half}_images"] = rng.integers(0, 255, (count, 4, 4, 3), dtype=np.uint8)
                arrays[f"{site}_{half}_labels"] = rng.integers(0, 5, (count, 1), dtype=np.uint8)
        np.savez(path, allow_pickle=False, **arrays)
    federation = load_benchmark("wbc_multisite", path, seed=0)
    assert list(federation.sites) == ["pbc", "tecom", "cellavision", "bccd"]
    assert (len(federation.sites["pbc"].train), len(federation.sites["pbc"].test)) in {(300, 150), (300, 127)}
    assert max(int(s.train.labels.max()) for s in federation.sites.values()) == 3
    other = load_benchmark("wbc_multisite", path, seed=1)
    assert not np.array_equal(other.pooled_test.images, federation.pooled_test.images)
    with pytest.raises(DataError, match="4 real sites, got sites = 3"):
        load_benchmark("wbc_multisite", path, sites=3)


def test_missing_or_unknown_data_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data file given .*--data PATH"):
        load_benchmark("bloodmnist")
    with pytest.raises(DataError, match="no such file"):
        load_benchmark("wbc_multisite", tmp_path / "none.npz")
    with pytest.raises(DataError, match="known: digits, bloodmnist, wbc_multisite"):
        load_benchmark("cifar")
