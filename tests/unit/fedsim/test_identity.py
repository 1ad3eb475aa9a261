"""Names of configurations that stored results go by: they don't change with the code."""

from pathlib import Path
from typing import Any

import pytest

from fedcore.data.benchmark_sets import load_benchmark, partition_record
from fedcore.plan import Plan, validate_plan
from fedsim.identity import config_hash

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
BLOOD, WBC = SHARED / "bloodmnist_rebuilt.npz", SHARED / "wbc_multisite_28.npz"
# Computed before there were partitions by name; thousands of stored runs have hashes of this kind.
PINNED = [
    ("digits", None, {"alpha": 0.1, "sites": 3, "max_train": 500}, "320db75af035c678"),
    ("digits", None, {"sites": 5}, "c30d8a56c6f57938"),
    ("bloodmnist", BLOOD, {"alpha": 0.1, "sites": 3, "max_train": 500}, "7467caf1039d9f60"),
    ("bloodmnist", BLOOD, {"sites": 5}, "28e59ba725270ca4"),
    ("wbc_multisite", WBC, {}, "5ba033ccbb985573"),
]


def plan_for(classes: int, shape: tuple[int, ...]) -> Plan:
    model = {"name": "cnn", "classes": classes, "input": list(shape)}
    return validate_plan({"name": "pinned", "rounds": 2, "seed": 1, "strategy": "fedavg", "model": model})


@pytest.mark.parametrize(("dataset", "data", "asked", "expected"), PINNED)
def test_stored_runs_keep_their_names(
    dataset: str, data: Path | None, asked: dict[str, Any], expected: str
) -> None:
    if data is not None and not data.exists():
        pytest.skip(f"{data} is not here")
    federation = load_benchmark(dataset, data, seed=1, **asked)
    plan = plan_for(len(federation.class_names), federation.input)
    assert config_hash(plan, partition_record(federation), device="cpu", threads=1) == expected


def test_the_name_follows_the_split_and_not_the_way_to_say_it() -> None:
    def name(**asked: Any) -> str:
        federation = load_benchmark("digits", sites=3, seed=1, max_train=300, **asked)
        return config_hash(plan_for(10, (1, 8, 8)), partition_record(federation), device="cpu", threads=1)

    assert name(alpha=0.1) == name(partition="dirichlet:0.1") == name(alpha=0.1, partition="dirichlet")
    others = [
        "iid",
        "dirichlet:0.1",
        "dirichlet:0.2",
        "shards:2",
        "shards:3",
        "quantity:0.5",
        "feature_shift:1",
    ]
    others += ["feature_shift:2", "dirichlet:0.1+feature_shift:1"]
    assert len({name(partition=text) for text in others}) == len(others)
