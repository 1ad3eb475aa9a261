"""Write docs/cli.md from the command lines themselves.

`python docs/generate_cli.py` writes the page; `--check` fails if the page is not what the code gives.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from fedagent import cli as fedagent
from fedctl import app as fedctl
from fedserver import cli as fedserver
from fedsim import cli as fedsim

PAGE = Path(__file__).with_name("cli.md")
PROGRAMS = {
    "fedctl": fedctl.app,
    "fedserver": fedserver.app,
    "fedagent": fedagent.app,
    "fedsim": fedsim.app,
}
HEAD = """\
# Command lines

Made from the code by `python docs/generate_cli.py`; a test holds it to the code. Don't edit it.

Data goes to stdout, progress and errors to stderr. Exit codes and what to do about each error: [errors.md](errors.md).
Every command has `--help`.
"""

# A command of typer's: its classes differ between versions, so nothing but these methods of theirs is used.
Command = Any


def commands(command: Command, context: typer.Context) -> Iterator[tuple[Command, typer.Context]]:
    """A command and all below it, hidden ones left out, in the order of the help; each with its context."""
    yield command, context
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from commands(child, typer.Context(child, info_name=name, parent=context))


def programs() -> Iterator[tuple[str, list[tuple[Command, typer.Context]]]]:
    """Every program with all its commands."""
    for name, app in PROGRAMS.items():
        root = typer.main.get_command(app)
        yield name, list(commands(root, typer.Context(root, info_name=name)))


def parameters(command: Command) -> list[Any]:
    """Arguments and options of a command that its help shows, without --help itself."""
    return [p for p in command.params if not getattr(p, "hidden", False)]


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, found in programs():
        for command, context in found:
            parts += _section(command, context, level="##" if context.command_path == name else "###")
    return "\n".join(parts)


def _section(command: Command, context: typer.Context, level: str) -> list[str]:
    usage = " ".join(command.get_usage(context).removeprefix("Usage:").split())
    lines = [f"{level} {context.command_path}", "", _prose(command.help), "", "```", usage, "```", ""]
    rows = [record for p in parameters(command) if (record := p.get_help_record(context)) is not None]
    if rows:
        lines += [f"- `{' '.join(left.split())}`: {' '.join(right.split())}" for left, right in rows]
        lines.append("")
    return lines


def _prose(text: str | None) -> str:
    """A docstring as Markdown: its paragraphs, each on one line."""
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is not what the code gives")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        raise SystemExit(
            "docs/cli.md is not what the code gives: run `python docs/generate_cli.py` and commit"
        )


if __name__ == "__main__":
    main()
