"""How results are shown: table, json or jsonl on stdout; notes and progress on stderr. One place for all
commands.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console


class Output(StrEnum):
    """Forms of output."""

    TABLE = "table"
    JSON = "json"
    JSONL = "jsonl"


OutputOption = Annotated[
    Output, typer.Option("--output", "-o", help="table for people, json or jsonl for programs.")
]


# Narrower than this a column of prose is no prose any more.
_MIN_WRAPPED = 12


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: heading, the key of a row's value, and how it stands.

    On a narrow terminal the columns that wrap give way first; the others are cut only when there is no room at all.
    """

    heading: str
    key: str
    right: bool = False
    style: str = ""
    wraps: bool = False


def console(file: TextIO | None = None) -> "Console":
    """A console on a stream, stdout by default. Off a terminal it neither colours nor wraps."""
    from rich.console import Console

    stream = file or sys.stdout
    if stream.isatty():
        return Console(file=stream, no_color="NO_COLOR" in os.environ or None, highlight=False)
    # Nothing is cut or wrapped when it goes to a file or a pipe.
    return Console(file=stream, width=10_000, color_system=None, highlight=False)


def note(text: str) -> None:
    """Say something about progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(document: Any, *, compact: bool = False) -> None:
    """One JSON document on stdout: indented, or on one line."""
    if compact:
        print(json.dumps(document, separators=(",", ":"), ensure_ascii=False), flush=True)
    else:
        print(json.dumps(document, indent=2, ensure_ascii=False), flush=True)


def print_rows(
    output: Output, key: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], *, empty: str
) -> None:
    """Show rows: a table, `{key: [...]}`, or one object a line. `empty` is said (stderr) where a table has
    no rows.
    """
    if output is Output.JSON:
        print_json({key: list(rows)})
    elif output is Output.JSONL:
        for row in rows:
            print_json(row, compact=True)
    elif not rows:
        note(empty)
    else:
        print_table(rows, columns)


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> None:
    """A table on stdout."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(
            column.heading,
            justify="right" if column.right else "left",
            style=column.style or None,
            no_wrap=not column.wraps,
            min_width=_MIN_WRAPPED if column.wraps else None,
        )
    for row in rows:
        table.add_row(*(plain(row.get(column.key)) for column in columns))
    _print(table)


def print_object(output: Output, document: Mapping[str, Any], lines: Sequence[tuple[str, Any]]) -> None:
    """Show one object: `lines` of label and value for people, the document for programs."""
    if output is not Output.TABLE:
        print_json(document, compact=output is Output.JSONL)
        return
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for label, value in lines:
        table.add_row(label, plain(value))
    _print(table)


def plain(value: Any) -> str:
    """A value as a cell of a table, its square brackets kept from rich's markup."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return plain(", ".join(str(item) for item in value))
    from rich.markup import escape

    return escape(str(value))


def minute(moment: str | None) -> str:
    """A moment of `-o json` (RFC 3339, UTC) as a table has room for it: 2026-03-01 12:00Z."""
    return f"{moment[:10]} {moment[11:16]}Z" if moment else ""


def percent(share: float | None) -> str:
    """A share in [0, 1] as a percentage with one decimal."""
    return "–" if share is None else f"{100 * share:.1f} %"


def sparkline(values: Sequence[float | None]) -> str:
    """Shares in [0, 1] as a line of blocks, one a value; a gap where there is none."""
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(" " if v is None else blocks[min(7, max(0, int(v * 8)))] for v in values)


def _print(renderable: Any) -> None:
    screen = console()
    with screen.capture() as capture:
        screen.print(renderable)
    # rich pads every line to its table's width; lines in a file need no tail of spaces.
    text = "\n".join(line.rstrip() for line in capture.get().splitlines()).strip("\n")
    print(text, flush=True)
