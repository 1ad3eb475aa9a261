"""Plug-ins: models, datasets, strategies and objectives of the user's own, found through Python entry points.

A plug-in is installed where it is used (pip install) and named in the plan or in agent.toml; nothing
executable crosses the wire. Built-in names win: a plug-in of the same name is refused, with a warning in
the log.

| group | object behind the entry point |
|---|---|
| fedimpres.models | `(section: fedcore.plan.ModelSection) -> fedcore.models.base.FederatedModel` |
| fedimpres.datasets | `(settings: fedcore.data.DatasetSettings) -> fedcore.data.DatasetReader` |
| fedimpres.strategies | see `fedserver.strategies` |
| fedimpres.objectives | see `fedagent.objectives` |

No torch here: a plug-in's own module is imported by `load_plugin` only.
"""

import logging
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Literal

from fedcore.errors import ConfigError, FedimpresError

Group = Literal["fedimpres.models", "fedimpres.datasets", "fedimpres.strategies", "fedimpres.objectives"]

_logger = logging.getLogger(__name__)


def plugin_names(group: Group, builtins: Collection[str] = ()) -> list[str]:
    """Names of the installed plug-ins of a group, sorted, less those that a built-in name hides.

    Imports no plug-in.
    """
    found = _by_name(group)
    for name in sorted(set(found) & set(builtins)):
        _logger.warning("%s: %s refused: '%s' is built in", group, _origin(found[name]), name)
    return sorted(set(found) - set(builtins))


def load_plugin(group: Group, name: str, builtins: Collection[str] = ()) -> object:
    """Import a plug-in and return the object behind its entry point.

    `builtins` are the group's built-in names: the caller looks there first, and they stand in the message.
    Raises ConfigError if the name is unknown (lists what is there), built in, claimed by two distributions,
    or if the plug-in's import fails.
    """
    found = _by_name(group)
    if name in builtins:
        raise ConfigError(f"{group}: '{name}' is built in, a plug-in may not replace it")
    if name not in found:
        known = ", ".join([*sorted(builtins), *plugin_names(group, builtins)]) or "none"
        raise ConfigError(
            f"{group}: unknown name '{name}', known: {known}",
            hint=f"check the spelling, or install the package that has the entry point '{name}' here",
        )
    if len(found[name]) > 1:
        raise ConfigError(
            f"{group}: '{name}' is claimed by {_origin(found[name])}", hint="uninstall all of these but one"
        )
    entry = found[name][0]
    try:
        return entry.load()
    except FedimpresError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{group}: {_origin([entry])} can't be imported: {type(error).__name__}: {error}",
            hint=f'try: python -c "import {entry.module}"',
        ) from error


def _by_name(group: Group) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group):
        others = found.setdefault(entry.name, [])
        # A folder that stands twice on sys.path shows the same entry point twice.
        if all(entry.value != other.value for other in others):
            others.append(entry)
    return found


def _origin(entries: list[EntryPoint]) -> str:
    parts = [
        f"plug-in '{entry.value}' of {entry.dist.name if entry.dist else 'an unknown distribution'}"
        for entry in entries
    ]
    return " and ".join(sorted(parts))
