"""Asking before something is done that can't be undone: one way for all commands."""

import sys
from typing import Annotated

import typer

from fedcore.errors import UsageError
from fedctl.render import note

YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask; needed off a terminal.")]


def check_can_ask(command: str, *, yes: bool) -> None:
    """Raise UsageError if `command` would have to ask and nobody is there to answer."""
    if not yes and not sys.stdin.isatty():
        raise UsageError(f"`{command}` can't ask for confirmation off a terminal", hint="add --yes")


def agree(question: str, *, yes: bool) -> None:
    """Go on if `yes` was given or is answered; else end the command with exit code 1, and say that nothing was done."""
    if not yes and not typer.confirm(question, err=True):
        note("nothing done")
        raise typer.Exit(1)
