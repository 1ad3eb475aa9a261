"""A small federation of real images, and plans that train on it within a second."""

from collections.abc import Callable
from typing import Any

import pytest

from fedcore.data.benchmark_sets import Federation, load_benchmark
from fedcore.plan import Plan, validate_plan

MakePlan = Callable[..., Plan]


@pytest.fixture(scope="session")
def federation() -> Federation:
    return load_benchmark("digits", sites=3, alpha=0.1, seed=0, max_train=150)


@pytest.fixture(scope="session")
def make_plan(federation: Federation) -> MakePlan:
    def make(**over: Any) -> Plan:
        document: dict[str, Any] = {
            "name": "tiny",
            "rounds": 2,
            "min_sites": 2,
            "strategy": "fedavg",
            "seed": 5,
            "model": {"name": "cnn", "classes": 10, "input": [1, 8, 8], "options": {"width": 4}},
            "training": {"epochs": 1, "batch_size": 16, "learning_rate": 0.05},
            "synthesis": {"warmup_rounds": 1, "images": 10},
            "data": {"class_names": list(federation.class_names)},
        }
        for key, value in over.items():
            document[key] = {**document[key], **value} if isinstance(document.get(key), dict) else value
        return validate_plan(document)

    return make
