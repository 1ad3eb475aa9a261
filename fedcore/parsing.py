"""JSON and TOML from outside: whatever is wrong with a text, the parser's answer is a ValueError.

Python's own parsers raise RecursionError for brackets nested thousands deep, and tomllib a bare ValueError for a number of
thousands of digits. Numbers that are not finite, which JSON does not know, are refused.
"""

import json
import tomllib
from typing import Any, NoReturn

_DEEP = "nested too deeply"


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says. Raises ValueError."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError(_DEEP) from error


def parse_toml(text: str) -> dict[str, Any]:
    """What a TOML document says. Raises ValueError."""
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise ValueError(_DEEP) from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
