"""The demo's plans: what suits each data set on two cores, written as the TOML that an operator would
write.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Recipe:
    """Rounds, local training and impressions that suit a data set."""

    rounds: int
    epochs: int
    batch_size: int
    learning_rate: float
    warmup_rounds: int
    images: int


# Small images learn in seconds; blood cells need more rounds than a demo has, so it shows a part of the way.
_RECIPES = {
    "digits": Recipe(12, 3, 16, 0.05, 1, 80),
    "bloodmnist": Recipe(10, 1, 64, 0.02, 1, 96),
    "wbc_multisite": Recipe(12, 3, 32, 0.02, 1, 80),
}
_DEFAULT = Recipe(10, 1, 32, 0.02, 1, 96)


def recipe_of(dataset: str) -> Recipe:
    """The recipe of a data set, by name; a file of the user's own gets a careful default."""
    return _RECIPES.get(dataset, _DEFAULT)


def plan_document(
    *,
    dataset: str,
    sites: Sequence[str],
    rounds: int | None,
    strategy: str,
    seed: int,
    class_names: Sequence[str],
    image_shape: tuple[int, int, int],
    updates_data: Path | None = None,
) -> dict[str, Any]:
    """The plan of a demo. `image_shape` is (channels, height, width) of the images as they are.

    With `updates_data`, an npz, the coordinator measures on it what local training does to each class.
    """
    recipe = recipe_of(dataset)
    document: dict[str, Any] = {
        "name": "demo",
        "rounds": rounds or recipe.rounds,
        "min_sites": max(1, len(sites) - 1),
        "strategy": strategy,
        "sites": list(sites),
        "seed": seed,
        "model": {"name": "cnn", "classes": len(class_names), "input": list(image_shape)},
        "training": {
            "epochs": recipe.epochs,
            "batch_size": recipe.batch_size,
            "optimizer": "sgd",
            "learning_rate": recipe.learning_rate,
            "momentum": 0.9,
        },
        "synthesis": {"warmup_rounds": recipe.warmup_rounds, "every_rounds": 1, "images": recipe.images},
        # Agents that start together on a busy machine need a while to import torch.
        "limits": {"round_deadline_s": 900, "stall_timeout_s": 120, "join_wait_s": 60},
        "data": {"class_names": list(class_names)},
    }
    if updates_data is not None:
        document["evaluation"] = {"updates_data": str(updates_data)}
    return document


def to_toml(document: Mapping[str, Any]) -> str:
    """A mapping of scalars, lists and one level of tables as TOML."""
    lines = [f"{key} = {_value(value)}" for key, value in document.items() if not isinstance(value, Mapping)]
    for key, table in document.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{key}]", *(f"{name} = {_value(value)}" for name, value in table.items())]
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(item) for item in value)}]"
    # JSON's strings, numbers and booleans are TOML's, but for DEL, which JSON leaves bare.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
