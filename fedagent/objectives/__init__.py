"""Objectives by name. Importing this package, and listing names, does not import torch; loading one does.

Built in: the names in `BUILT_IN`. The user's own: entry points of the group
`fedimpres.objectives`, a subclass of `fedagent.objectives.base.LocalObjective`.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from fedcore.errors import ConfigError, PlanError
from fedcore.plan import describe_problems
from fedcore.plugins import load_plugin, plugin_names

if TYPE_CHECKING:
    from fedagent.objectives.base import LocalObjective

__all__ = ["BUILT_IN", "load_objective", "objective_names"]

BUILT_IN = {
    "cross_entropy": "fedagent.objectives.cross_entropy:CrossEntropy",
    "impressions": "fedagent.objectives.impressions:Impressions",
    "moon": "fedagent.objectives.moon:ModelContrast",
    "ntd": "fedagent.objectives.ntd:NotTrueDistillation",
    "proximal": "fedagent.objectives.proximal:Proximal",
    "scaffold": "fedagent.objectives.scaffold:ControlVariates",
}


def objective_names() -> list[str]:
    """Names of the objectives installed at this site, plug-ins included.

    Imports neither torch nor a plug-in.
    """
    return sorted([*BUILT_IN, *plugin_names("fedimpres.objectives", BUILT_IN)])


def load_objective(name: str, options: Mapping[str, Any]) -> "LocalObjective":
    """An objective with its validated options.

    Raises PlanError if the name or an option is unknown here, ConfigError if a plug-in is at fault.
    """
    from fedagent.objectives.base import LocalObjective

    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        kind = getattr(importlib.import_module(module), attribute)
    else:
        if name not in objective_names():
            raise PlanError(
                f"objective '{name}' is unknown at this site, known: {', '.join(objective_names())}",
                hint="install the plug-in that brings it at the site",
            )
        kind = load_plugin("fedimpres.objectives", name, BUILT_IN)
    if not (isinstance(kind, type) and issubclass(kind, LocalObjective)):
        raise ConfigError(f"objective plug-in '{name}' is {kind!r}, expected a subclass of LocalObjective")
    try:
        return kind(kind.Options.model_validate(dict(options)))
    except ValidationError as error:
        known = ", ".join(kind.Options.model_fields) or "none"
        raise PlanError(
            f"options of objective '{name}': {describe_problems(error)}", hint=f"its options are: {known}"
        ) from error
