"""The evaluation protocol as code: profiles, and the plan that a strategy runs under. No torch.

A comparison never tunes: tuned settings come with the package (`tuned.json`, by data set), or from a file in their
place, one table a strategy, in the form of a plan:

    [fedavg.training]
    learning_rate = 0.03
    [fedimpres.strategy_options]
    impression_weight = 0.5
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fedcore.data.benchmark_sets import Federation
from fedcore.errors import ConfigError, PlanError
from fedcore.parsing import parse_toml
from fedcore.plan import Plan, validate_plan

Document = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Profile:
    """How much of everything: training images in all (None: all there are), sites, rounds, local training."""

    name: str
    max_train: int | None
    sites: int
    rounds: int
    epochs: int
    batch_size: int


PROFILES: Mapping[str, Profile] = {
    "small": Profile("small", max_train=3000, sites=8, rounds=20, epochs=3, batch_size=32),
    "full": Profile("full", max_train=None, sites=8, rounds=40, epochs=2, batch_size=64),
}
LEARNING_RATE = 0.02
# 1.6 times as fast as fp32 on a CPU with AVX512-BF16 or AMX, the same for every row; scoring stays in fp32.
PRECISION = "bf16"
IMPRESSIONS = 160
# By data set and strategy; written by `benchmarks/results.py tune`.
STORED_SETTINGS = Path(__file__).with_name("tuned.json")


def profile_of(name: str) -> Profile:
    """A profile by name. Raises ConfigError that lists the known ones."""
    if name not in PROFILES:
        raise ConfigError(f"profile '{name}' is unknown, known: {', '.join(PROFILES)}")
    return PROFILES[name]


def plan_of(
    profile: Profile,
    federation: Federation,
    strategy: str,
    *,
    seed: int,
    rounds: int | None = None,
    model: str = "cnn",
    settings: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan of a strategy under a profile; `settings`, a part of a plan, goes over it.

    The first quarter of the rounds ends before the first impressions are made: remembering a bad model hurts.
    Raises PlanError.
    """
    count = rounds or profile.rounds
    document: Document = {
        "name": "compare",
        "rounds": count,
        "min_sites": 1,
        "strategy": strategy,
        "seed": seed,
        "model": {"name": model, "classes": len(federation.class_names), "input": list(federation.input)},
        "training": {
            "epochs": profile.epochs,
            "batch_size": profile.batch_size,
            "learning_rate": LEARNING_RATE,
            "momentum": 0.9,
            "precision": PRECISION,
        },
        "synthesis": {"warmup_rounds": max(1, count // 4), "every_rounds": 1, "images": IMPRESSIONS},
        "data": {"class_names": list(federation.class_names)},
    }
    return validate_plan(merged(document, settings or {}), f"plan of '{strategy}'")


def load_settings(path: Path) -> dict[str, Document]:
    """Tuned settings by strategy. Raises ConfigError."""
    try:
        document = parse_toml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    for strategy, part in document.items():
        if not isinstance(part, dict):
            raise ConfigError(f"{path}: '{strategy}' is {part!r}, expected a table of plan keys")
    return document


def stored_settings(dataset: str) -> dict[str, Document]:
    """The tuned settings that come with this version, by strategy; none for a data set nothing was tuned on."""
    document: dict[str, dict[str, Document]] = json.loads(STORED_SETTINGS.read_text(encoding="utf-8"))
    return document.get(dataset, {})


def merged(document: Mapping[str, Any], over: Mapping[str, Any]) -> Document:
    """`document` with the values of `over` in place of its own, table by table. Neither is changed."""
    result = dict(document)
    for key, value in over.items():
        below = result.get(key)
        result[key] = merged(below, value) if isinstance(value, dict) and isinstance(below, dict) else value
    return result


@dataclass(frozen=True, slots=True)
class Axis:
    """One `--set KEY=V1,V2,...` of a sweep."""

    key: str
    values: tuple[Any, ...]


def parse_axis(text: str) -> Axis:
    """Read "training.learning_rate=0.01,0.02"; values are TOML scalars, else text. Raises PlanError."""
    key, equals, values = text.partition("=")
    if not equals or not key.strip() or not values.strip():
        raise PlanError(
            f"--set {text!r}: expected KEY=VALUE,...", hint="for example training.learning_rate=0.01,0.02"
        )
    return Axis(key.strip(), tuple(_value(part.strip()) for part in values.split(",")))


def variants(plan: Plan, axes: Sequence[Axis]) -> Iterator[tuple[tuple[str, ...], Plan]]:
    """Every combination of the axes' values: as "KEY=VALUE" texts, and the plan with it. Raises PlanError."""
    base = plan.model_dump(mode="json", exclude_none=True)
    for values in product(*(axis.values for axis in axes)):
        chosen = list(zip((axis.key for axis in axes), values, strict=True))
        texts = tuple(f"{key}={_shown(value)}" for key, value in chosen)
        document = base
        for key, value in chosen:
            over: Any = value
            for part in reversed(key.split(".")):
                over = {part: over}
            document = merged(document, over)
        yield texts, validate_plan(document, f"plan with {' '.join(texts)}")


def _shown(value: Any) -> str:
    """A value as `parse_axis` reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def _value(text: str) -> Any:
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text
