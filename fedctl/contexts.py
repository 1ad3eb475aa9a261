"""Which coordinators this operator knows: contexts.toml, a name for each credential folder."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedcore.errors import ConfigError, ConflictError, NotFoundError, UsageError
from fedcore.parsing import parse_toml

CREDENTIAL_FILES = ("ca.crt", "tls.crt", "tls.key", "credential.toml")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True)
class Contexts:
    """The known contexts, name -> credential folder, and which one is current (None only while there are
    none).
    """

    folders: Mapping[str, Path] = field(default_factory=dict)
    current: str | None = None

    def add(self, name: str, folder: Path) -> "Contexts":
        """With one more context; the first becomes the current one.

        Raises ConfigError if the name is not valid or the folder incomplete, ConflictError if the name is
        taken.
        """
        self.refuse_name(name)
        folder = folder.resolve()
        check_complete(folder)
        return Contexts({**self.folders, name: folder}, self.current or name)

    def refuse_name(self, name: str) -> None:
        """Raise ConfigError if a new context can't be called so, ConflictError if one is."""
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"context name '{name}' is not valid",
                hint="use letters, digits, '.', '_' and '-', at most 63",
            )
        if name in self.folders:
            raise ConflictError(
                f"context '{name}' is already there, for {self.folders[name]}",
                hint=f"remove it first: fedctl context remove {name}",
            )

    def use(self, name: str) -> "Contexts":
        """With another current context. Raises NotFoundError."""
        self.folder(name)
        return Contexts(self.folders, name)

    def remove(self, name: str) -> "Contexts":
        """Without a context; if it was the current one, the only one left takes its place. Raises
        NotFoundError.
        """
        self.folder(name)
        left = {other: folder for other, folder in self.folders.items() if other != name}
        current = self.current
        if current == name:
            current = next(iter(left)) if len(left) == 1 else None
        return Contexts(left, current)

    def folder(self, name: str | None = None) -> Path:
        """The credential folder of a context, by default of the current one. Raises NotFoundError,
        ConfigError.
        """
        chosen = name or self.current
        if chosen is None:
            hint = "fedctl context use NAME" if self.folders else "fedctl context add NAME --credential DIR"
            raise ConfigError("no current context", hint=hint)
        if chosen not in self.folders:
            known = ", ".join(sorted(self.folders)) or "none"
            raise NotFoundError(f"no context '{chosen}'", hint=f"known contexts: {known}")
        return self.folders[chosen]


def check_complete(folder: Path) -> None:
    """Check that a credential folder holds all that fedctl needs. Raises ConfigError that names what is
    missing.
    """
    missing = [name for name in CREDENTIAL_FILES if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder}: not a complete credential folder; missing {', '.join(missing)}",
            hint="give the folder that `fedserver init` made: HOME/operator",
        )


def config_dir(environment: Mapping[str, str]) -> Path:
    """Where fedctl keeps its settings: $FEDIMPRES_CONFIG_DIR, else $XDG_CONFIG_HOME or ~/.config,
    /fedimpres.
    """
    if explicit := environment.get("FEDIMPRES_CONFIG_DIR"):
        return Path(explicit)
    base = environment.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "fedimpres"


def load_contexts(folder: Path) -> Contexts:
    """Read contexts.toml; none if there is no such file. Raises ConfigError."""
    path = folder / "contexts.toml"
    try:
        document = parse_toml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Contexts()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    return _validate(document, path)


def save_contexts(folder: Path, contexts: Contexts) -> None:
    """Write contexts.toml whole or not at all. Raises ConfigError if the folder can't be written."""
    lines = [f"current = {_quote(contexts.current)}"] if contexts.current else []
    for name, credential in contexts.folders.items():
        lines += ["", f"[contexts.{_quote(name)}]", f"credential = {_quote(str(credential))}"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, delete=False) as file:
            file.write("\n".join(lines).lstrip("\n") + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, folder / "contexts.toml")
    except OSError as error:
        raise ConfigError(f"{folder}: contexts can't be saved: {error}") from error


def _validate(document: dict[str, Any], path: Path) -> Contexts:
    unknown = sorted(document.keys() - {"current", "contexts"})
    if unknown:
        raise ConfigError(f"{path}: unknown key '{unknown[0]}'")
    tables = document.get("contexts", {})
    current = document.get("current")
    if not isinstance(tables, dict) or not (current is None or isinstance(current, str)):
        raise ConfigError(f"{path}: 'contexts' must be a table and 'current' a string")
    folders: dict[str, Path] = {}
    for name, table in tables.items():
        if not isinstance(table, dict) or not isinstance(table.get("credential"), str) or len(table) != 1:
            raise ConfigError(f"{path}: context '{name}' must have the one key 'credential', a path")
        folders[name] = Path(table["credential"])
    if current is not None and current not in folders:
        raise ConfigError(f"{path}: current context '{current}' is not among the contexts")
    return Contexts(folders, current)


def _quote(text: str | None) -> str:
    # JSON's escapes are those of a TOML basic string, but for DEL, which JSON leaves bare.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
