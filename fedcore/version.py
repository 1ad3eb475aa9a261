"""The version of the installed distribution."""

from functools import cache
from importlib.metadata import version


@cache
def software_version() -> str:
    """The distribution's version, as pip shows it."""
    return version("fedimpres")
