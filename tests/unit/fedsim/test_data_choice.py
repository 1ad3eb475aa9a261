"""What the options that say how images are dealt come to together."""

from pathlib import Path
from typing import Any

import pytest

from fedcore.data.benchmark_sets import load_benchmark, partition_record
from fedcore.data.saved_partition import partition_text
from fedcore.errors import ConfigError, DataError
from fedsim.comparison import Comparison, comparison_specs
from fedsim.data_choice import DataChoice, choose_data
from fedsim.experiments import DataSpec

NONE: dict[str, Any] = {"sites": None, "alpha": None, "partition": None, "partition_file": None}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "partition.json"
    federation = load_benchmark("digits", sites=3, alpha=0.1, seed=5, max_train=200)
    path.write_text(partition_text(partition_record(federation)))
    return path


@pytest.mark.parametrize(
    ("asked", "arguments"),
    [
        ({}, ""),
        ({"alpha": 0.1}, "--alpha 0.1"),
        ({"partition": "dirichlet:0.1"}, "--alpha 0.1"),
        ({"partition": "iid", "sites": 3}, "--sites 3"),
        ({"partition": "shards", "sites": 3}, "--partition shards:2 --sites 3"),
        ({"partition": "feature_shift", "alpha": 0.1}, "--partition dirichlet:0.1+feature_shift:1"),
        ({"alpha": 0.123456789}, "--alpha 0.123456789"),
    ],
)
def test_a_command_repeats_the_choice(asked: dict[str, Any], arguments: str) -> None:
    choice = choose_data(None, None, **{**NONE, **asked})
    assert choice.dataset == "digits"
    assert choice.split_arguments() == arguments.split()
    # And the choice survives the way through a line of runs.jsonl.
    assert DataSpec.of(choice, 0).choice == choice


def test_a_file_says_everything(saved: Path) -> None:
    choice = choose_data(None, None, **{**NONE, "partition_file": saved})
    assert choice == DataChoice("digits", None, partition_file=saved)
    assert choice.split_arguments() == ["--partition-file", str(saved)]
    for option, value in (("alpha", 0.1), ("sites", 3), ("partition", "iid"), ("max_train", 9)):
        named = f"--{option.replace('_', '-')}"
        with pytest.raises(ConfigError, match=f"says which image is where, {named} contradicts it"):
            choose_data(None, None, **{**NONE, "partition_file": saved, option: value})
    with pytest.raises(DataError, match="can't be read"):
        choose_data(None, None, **{**NONE, "partition_file": saved.with_name("none.json")})


def test_real_sites_take_no_skew() -> None:
    with pytest.raises(ConfigError, match="wbc_multisite is dealt by its real sites"):
        choose_data("wbc_multisite", None, **{**NONE, "alpha": 0.1})
    assert choose_data("wbc_multisite", None, **{**NONE, "partition": "by_site"}).split_arguments() == []
    assert choose_data("own.npz", None, **{**NONE, "partition": "by_site"}).real_sites


def comparison(choice: DataChoice, out: Path, seeds: tuple[int, ...] = (0, 1)) -> Comparison:
    return Comparison(
        dataset=choice.dataset, data=None, strategies=("fedavg",), seeds=seeds, alpha=choice.alpha, out=out,
        sites=choice.sites, partition=choice.partition, partition_file=choice.partition_file, settings={},
    )  # fmt: skip


def test_a_comparison_on_a_saved_split_has_one_split_and_many_seeds(saved: Path, tmp_path: Path) -> None:
    choice = choose_data(None, None, **{**NONE, "partition_file": saved})
    one, other = comparison_specs(comparison(choice, tmp_path))
    assert one.config != other.config
    first, second = one.data.load(), other.data.load()
    assert partition_record(first) == partition_record(second)
    assert first.alpha == 0.1
    assert f"--partition-file {saved}" in one.command


def test_a_comparison_deals_by_name(tmp_path: Path) -> None:
    choice = choose_data(None, None, **{**NONE, "partition": "shards"})
    (spec,) = comparison_specs(comparison(choice, tmp_path, seeds=(4,)))
    assert spec.data == DataSpec("digits", None, 8, None, 4, 3000, "shards:2", None)
    assert spec.data.load().partition == "shards:2"
    assert "--partition shards:2" in spec.command
