"""The configuration in force, key by key, for people to read: defaults included, secrets masked. Pure."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

MASK = "***"
# The value of such a key is a secret, unless the key says that it is a file's path.
_SECRET = re.compile(r"password|passphrase|secret|token|credential|(^|_)key$", re.IGNORECASE)
_FILE = re.compile(r"_(file|path|folder|dir)$", re.IGNORECASE)
_USER_INFO = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True, slots=True)
class Setting:
    """One key. `value` is what JSON can hold; `from_file` tells a value that was written down from a default."""

    key: str
    value: Any
    from_file: bool


def settings_of(section: BaseModel, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a configuration, in the order of its schema, keys dotted."""
    document = section.model_dump(mode="json")
    for name in type(section).model_fields:
        value, key = getattr(section, name), prefix + name
        if isinstance(value, BaseModel):
            yield from settings_of(value, f"{key}.")
        else:
            yield Setting(key, masked(name, document[name]), name in section.model_fields_set)


def masked(name: str, value: Any) -> Any:
    """The value of a key as it may be shown."""
    if _SECRET.search(name) and not _FILE.search(name) and value not in (None, "", (), [], {}):
        return MASK
    if isinstance(value, str):
        return _USER_INFO.sub(f"{MASK}@", value)
    if isinstance(value, list):
        return [masked(name, one) for one in value]
    if isinstance(value, dict):
        return {key: masked(key, one) for key, one in value.items()}
    return value
