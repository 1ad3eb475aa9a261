"""TOML files to validated, frozen objects. An unknown key is an error. Configuration is read once, in app.py."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fedcore.errors import ConfigError
from fedcore.parsing import parse_toml
from fedcore.plan import describe_problems


class ConfigSection(BaseModel):
    """Base of every configuration object: frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


ConfigT = TypeVar("ConfigT", bound=BaseModel)


def load_config(path: Path, schema: type[ConfigT]) -> ConfigT:
    """Read and validate a TOML file. Raises ConfigError that names the file and the keys."""
    try:
        document = parse_toml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    try:
        return schema.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{path}: {describe_problems(error)}") from error
