"""Strategies by name. Importing this package, and loading a built-in strategy, does not import torch.

Built in: the names in `BUILT_IN`. The user's own: entry points of the group
`fedimpres.strategies`, a subclass of `fedserver.strategies.base.Strategy`.
"""

import importlib

from pydantic import ValidationError

from fedcore.errors import ConfigError, PlanError
from fedcore.plan import Plan, describe_problems
from fedcore.plugins import load_plugin, plugin_names
from fedserver.strategies.base import Strategy

__all__ = ["BUILT_IN", "load_strategy", "makes_impressions", "strategy_names"]

BUILT_IN = {
    "fedavg": "fedserver.strategies.fedavg:FedAvg",
    "fedavg_uniform": "fedserver.strategies.fedavg_uniform:FedAvgUniform",
    "fedbn": "fedserver.strategies.fedbn:FedBN",
    "fedimpres": "fedserver.strategies.fedimpres:FedImpres",
    "fedimpres_paper": "fedserver.strategies.fedimpres_paper:FedImpresPaper",
    "fedlc": "fedserver.strategies.fedlc:FedLC",
    "fedntd": "fedserver.strategies.fedntd:FedNTD",
    "fedopt": "fedserver.strategies.fedopt:FedOpt",
    "fedprox": "fedserver.strategies.fedprox:FedProx",
    "moon": "fedserver.strategies.moon:Moon",
    "scaffold": "fedserver.strategies.scaffold:Scaffold",
    "vhl": "fedserver.strategies.vhl:VHL",
}


def strategy_names() -> list[str]:
    """Names that a plan may give as its strategy here, plug-ins included. Imports no plug-in."""
    return sorted([*BUILT_IN, *plugin_names("fedimpres.strategies", BUILT_IN)])


def load_strategy(plan: Plan) -> Strategy:
    """The plan's strategy with its validated options.

    Raises PlanError if the strategy or one of its options is unknown, or a value is out of range; the message
    lists what is known. Raises PlanError too if the strategy can't work with the rest of the plan.
    """
    kind = _strategy_class(plan.strategy)
    try:
        options = kind.Options.model_validate(plan.strategy_options)
    except ValidationError as error:
        known = ", ".join(kind.Options.model_fields)
        raise PlanError(
            f"strategy_options of '{plan.strategy}': {describe_problems(error)}",
            hint=f"its options are: {known}",
        ) from error
    strategy = kind(options)
    strategy.check(plan)
    strategy.recalibrates(plan)
    return strategy


def makes_impressions(plan: Plan) -> bool:
    """Whether the plan's strategy makes impressions at all. Raises PlanError, as `load_strategy` does."""
    return load_strategy(plan).synthesis is not None


def _strategy_class(name: str) -> type[Strategy]:
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        found = getattr(importlib.import_module(module), attribute)
    else:
        if name not in strategy_names():
            raise PlanError(
                f"strategy '{name}' is unknown, known: {', '.join(strategy_names())}",
                hint="check the spelling, or install the plug-in that brings it at the coordinator",
            )
        found = load_plugin("fedimpres.strategies", name, BUILT_IN)
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        raise ConfigError(f"strategy plug-in '{name}' is {found!r}, expected a subclass of Strategy")
    return found
