"""A split saved as indices comes back bit for bit; another data set or a damaged file does not pass for it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.data import partition_scheme
from fedcore.data.benchmark_sets import (
    Federation,
    SiteSplit,
    load_benchmark,
    load_partition,
    load_recorded,
    partition_record,
    write_site,
)
from fedcore.data.saved_partition import partition_text
from fedcore.errors import DataError

Record = dict[str, Any]
SCHEMES = ("iid", "dirichlet:0.1", "shards:2", "quantity:0.3", "feature_shift", "shards:3+feature_shift:0.5")


def assert_equal(one: Federation, other: Federation) -> None:
    assert list(one.sites) == list(other.sites)
    for name in one.sites:
        for first, second in zip(one.sites[name].parts, other.sites[name].parts, strict=True):
            assert np.array_equal(first.images, second.images)
            assert np.array_equal(first.labels, second.labels)
    assert np.array_equal(one.pooled_test.images, other.pooled_test.images)
    assert np.array_equal(one.pooled_test.labels, other.pooled_test.labels)
    kept = (
        "dataset",
        "class_names",
        "input",
        "description",
        "method",
        "alpha",
        "seed",
        "max_train",
        "partition",
    )
    assert [getattr(one, key) for key in kept] == [getattr(other, key) for key in kept]


def save(federation: Federation, path: Path) -> Path:
    path.write_text(partition_text(partition_record(federation)))
    return path


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """Digits of three hospitals: an npz with MedMNIST's keys, and each image's site."""
    everything = load_benchmark("digits", sites=1, seed=4).sites["site-1"]
    path = tmp_path / "own.npz"
    write_site(everything, path)
    with np.load(path) as file:
        arrays = dict(file)
    names = np.array(["south", "north", "east"])
    for key in ("train", "val", "test"):
        arrays[f"{key}_sites"] = names[np.arange(len(arrays[f"{key}_labels"])) % 3]
    np.savez(path, allow_pickle=False, **arrays)
    return path


@pytest.mark.parametrize("text", SCHEMES)
def test_saved_sites_come_back_without_dealing(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = load_benchmark("digits", sites=3, partition=text, seed=2, max_train=300)
    path = save(federation, tmp_path / "partition.json")
    assert len(path.read_text().splitlines()) < 30

    def never(*args: object, **more: object) -> None:
        raise AssertionError("dealt again")

    monkeypatch.setattr(partition_scheme.partition, "iid", never)
    monkeypatch.setattr("fedcore.data.benchmark_sets.deal", never)
    assert_equal(load_partition(path), federation)
    assert_equal(load_partition(path, dataset="digits"), federation)


def test_real_sites_of_a_file_of_ones_own(npz: Path, tmp_path: Path) -> None:
    federation = load_benchmark(str(npz), partition="by_site", seed=0)
    assert (federation.method, federation.partition) == ("real sites", "by_site")
    assert list(federation.sites) == ["east", "north", "south"]
    with np.load(npz) as file:
        for key, part in zip(("train", "val", "test"), federation.sites["north"].parts, strict=True):
            assert np.array_equal(part.images, file[f"{key}_images"][1::3])
    path = save(federation, tmp_path / "partition.json")
    assert_equal(load_partition(path), federation)
    with pytest.raises(DataError, match="has 3 real sites, got sites = 4"):
        load_benchmark(str(npz), partition="by_site", sites=4)
    with pytest.raises(DataError, match="max_train is not for real sites"):
        load_benchmark(str(npz), partition="by_site", max_train=100)
    # Dealt any other way, the file's sites don't matter.
    assert len(load_benchmark(str(npz), partition="shards", sites=5).sites) == 5


def test_lacking_splits_of_real_sites_are_cut_at_each_site(npz: Path) -> None:
    with np.load(npz) as file:
        arrays = {key: file[key] for key in ("train_images", "train_labels", "train_sites")}
    arrays["train_sites"] = (np.arange(len(arrays["train_labels"])) % 2)[:, np.newaxis]
    np.savez(npz, allow_pickle=False, **arrays)
    federation = load_benchmark(str(npz), partition="by_site", seed=0)
    assert list(federation.sites) == ["site-0", "site-1"]
    for offset, split in enumerate(federation.sites.values()):
        assert split.indices is not None
        together = np.sort(np.concatenate(list(split.indices.values())))
        assert together.tolist() == list(range(offset, len(arrays["train_labels"]), 2))
        assert len(split.validation) == len(split.test) == round(0.2 * len(together))


def test_sites_that_do_not_fit_their_images_are_refused(npz: Path) -> None:
    with np.load(npz) as file:
        arrays = dict(file)
    np.savez(npz, allow_pickle=False, **{**arrays, "val_sites": arrays["val_sites"][:5]})
    with pytest.raises(
        DataError, match="val_sites: 5 entries of <U5, expected a name or a whole number for each"
    ):
        load_benchmark(str(npz), partition="by_site")
    with pytest.raises(DataError, match="digits: the file does not tell the images' sites"):
        load_benchmark("digits", partition="by_site")


def test_a_file_that_moved_is_known_by_its_images(npz: Path, tmp_path: Path) -> None:
    federation = load_benchmark(str(npz), sites=2, partition="shards", seed=0)
    path = save(federation, tmp_path / "partition.json")
    moved = npz.rename(tmp_path / "moved.npz")
    with pytest.raises(DataError, match="no such file"):
        load_partition(path)
    again = load_partition(path, dataset=str(moved))
    assert again.dataset == str(moved)
    assert np.array_equal(again.sites["site-2"].train.images, federation.sites["site-2"].train.images)


def test_other_images_or_another_data_set_are_refused(npz: Path, tmp_path: Path) -> None:
    path = save(load_benchmark(str(npz), sites=2, seed=0), tmp_path / "partition.json")
    with np.load(npz) as file:
        arrays = dict(file)
    arrays["train_images"][0, 0, 0] ^= 1
    np.savez(npz, allow_pickle=False, **arrays)
    with pytest.raises(DataError, match=r"partition.json: made of other images: .*own.npz has sha256"):
        load_partition(path)
    with pytest.raises(DataError, match=r"is a split of '.*own.npz', asked for 'digits'"):
        load_partition(path, dataset="digits")


def doctored(change: Callable[[Record], object]) -> str:
    record = partition_record(
        load_benchmark("digits", sites=2, partition="feature_shift", seed=0, max_train=60)
    )
    change(record)
    return json.dumps(record)


def in_first(change: Callable[[Record], object]) -> str:
    return doctored(lambda record: change(record["sites"]["site-1"]))


def swap(site: Record) -> None:
    train = site["indices"]["train"]
    train[0], train[1] = train[1], train[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: "", "it is not JSON"),
        (lambda: doctored(lambda r: None)[:-20], "it is not JSON"),
        (lambda: "[1, 2]", "the whole: "),
        (lambda: doctored(lambda r: r.pop("dataset")), "dataset: field required"),
        (lambda: doctored(lambda r: r.update(sites={})), "sites: dictionary should have at least 1 item"),
        (lambda: doctored(lambda r: r.update(seed="0")), "seed: input should be a valid integer"),
        (lambda: doctored(lambda r: r.update(partition="nine")), "'nine' is unknown"),
        (lambda: doctored(lambda r: r.update(data_sha256="0" * 64)), "made of other images"),
        (lambda: in_first(lambda s: s.update(sha256="0" * 64)), "site-1 is not as recorded"),
        (lambda: in_first(lambda s: s.pop("sha256")), "sites.site-1.sha256: field required"),
        (lambda: in_first(lambda s: s.pop("indices")), "sites.site-1.indices: missing"),
        (lambda: in_first(lambda s: s["indices"].pop("test")), r"site-1.indices.test: missing"),
        (lambda: in_first(lambda s: s["indices"]["train"].pop()), "site-1 is not as recorded"),
        (
            lambda: in_first(lambda s: s["indices"]["train"].append(1797)),
            "1797, the data set has 1797 images",
        ),
        (lambda: in_first(lambda s: s["indices"]["train"].insert(0, -1)), "greater than or equal to 0"),
        (lambda: in_first(lambda s: s["indices"]["train"].append(1.5)), "indices.train.*integer"),
        (lambda: in_first(swap), "train: out of order, or an image is there twice"),
        (lambda: in_first(lambda s: s["indices"].update(test=s["indices"]["train"])), "image is there twice"),
        (lambda: in_first(lambda s: s["shift"].update(brightness=1.0)), "site-1 is not as recorded"),
        (lambda: in_first(lambda s: s["shift"].update(stain=[1.0, 1.0])), "2 numbers for 1 channels"),
        (lambda: in_first(lambda s: s["shift"].update(blur_px=1e9)), "shift.blur_px: "),
    ],
)
def test_a_damaged_file_is_one_clear_error(make: Callable[[], str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    path.write_text(make())
    with pytest.raises(DataError, match=message) as caught:
        load_partition(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_file_that_is_not_there_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"partition.json lies in the folder of a run"):
        load_partition(tmp_path / "none.json")


def test_sites_of_ones_own_have_a_record_without_indices() -> None:
    dealt = load_benchmark("digits", sites=1, seed=0)
    own = SiteSplit(*dealt.sites["site-1"].parts)
    record = partition_record(
        Federation(
            dataset="mine", sites={"ward": own}, class_names=dealt.class_names, input=dealt.input,
            pooled_test=own.test, description="", method="own", alpha=None, seed=0,
        )
    )  # fmt: skip
    assert "indices" not in record["sites"]["ward"]
    assert json.loads(partition_text(record)) == record
    with pytest.raises(DataError, match="unknown benchmark 'mine'"):
        load_recorded(record)
