"""What names a configuration: everything that determines a run's result. No torch."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedcore.errors import PlanError
from fedcore.plan import Plan

# Rounds at the end in which forgetting is measured, unless said otherwise.
FORGETTING_ROUNDS = 5


def config_hash(
    plan: Plan,
    split: Mapping[str, Any],
    *,
    device: str,
    threads: int,
    forgetting_rounds: int = FORGETTING_ROUNDS,
    reference: str = "",
    check_impressions: bool = False,
    attacks: Mapping[str, str] | None = None,
    late_sites: Collection[str] = (),
) -> str:
    """16 hexadecimal digits that name a configuration: plan less its name and defaults, split, device, threads.

    `reference` tells pooled training and single sites from a federation, `check_impressions` a federation whose sites
    check the impressions that they get from one whose sites don't; `attacks` are those of bad sites. Raises
    PlanError if the plan's initial model is not there.
    """
    # Less what is at its default: an option that a later version adds changes no name.
    document = plan.model_dump(mode="json", exclude_defaults=True)
    del document["name"]
    initial = ""
    if plan.training.initial is not None:
        initial = hashlib.sha256(initial_model_path(plan).read_bytes()).hexdigest()
        del document["training"]["initial"]
    sites = {name: site["sha256"] for name, site in split["sites"].items()}
    parts = [document, initial, sites, device, threads, forgetting_rounds, reference]
    if check_impressions:
        parts.append("checks impressions")
    if attacks:
        parts.append(["attacks", dict(attacks)])
    if late_sites:
        parts.append(["late", sorted(late_sites)])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def initial_model_path(plan: Plan) -> Path:
    """The file of `training.initial`. Raises PlanError: a simulation knows no other runs."""
    path = Path(plan.training.initial or "")
    if not path.is_file():
        raise PlanError(
            f"plan: training.initial: no such file: {path}",
            hint="a simulation starts from a safetensors file; it has no store of earlier runs",
        )
    return path
