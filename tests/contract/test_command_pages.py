"""The command lines are held to their page and to the tree of the design: help everywhere, nothing missing.

A command was added or changed? `python docs/generate_cli.py`, and commit docs/cli.md.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parents[2]


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = _generator()
COMMANDS: list[tuple[Any, typer.Context]] = [found for _, below in GENERATOR.programs() for found in below]
PATHS = [context.command_path for _, context in COMMANDS]

# What operators were promised (the design's tree), program by program; `a (b c)` are the commands of a group.
TREE = {
    "fedctl": "context (add use list show remove) status run (plan submit list show watch wait pause resume abort "
    "logs rounds export) site (list show drain enable disable remove ping logs) enroll (token request) cert (list "
    "show revoke renew ca) role (grant revoke list) auth (whoami can-i) model (list show download verify) "
    "impression (list show preview purge) audit (list tail export verify) backup (create verify restore) "
    "server (health config drain debug-bundle) completion version demo",
    "fedserver": "init serve check-config preflight migrate version",
    "fedagent": "enroll serve check-config preflight doctor status pause resume version",
    "fedsim": "run compare sweep show plot",
}


def promised() -> Iterator[str]:
    """Every command of the tree, by its path."""
    for program, line in TREE.items():
        for name, below in re.findall(r"([\w-]+)(?: \(([^)]*)\))?", line):
            yield f"{program} {name}"
            yield from (f"{program} {name} {child}" for child in below.split())


def test_the_page_is_what_the_code_gives():
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == GENERATOR.page(), "run `python docs/generate_cli.py` and commit docs/cli.md"


@pytest.mark.parametrize(("command", "context"), COMMANDS, ids=PATHS)
def test_commands_and_their_arguments_and_options_have_help(command, context):
    assert command.help, f"{context.command_path}: no help: give its function a docstring"
    for parameter in GENERATOR.parameters(command):
        assert parameter.help, f"{context.command_path}: '{parameter.name}' has no help"


def test_every_promised_command_is_there():
    assert set(promised()) - set(PATHS) == set()
