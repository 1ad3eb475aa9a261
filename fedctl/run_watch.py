"""fedctl run watch: a live view on a terminal, a line per change elsewhere."""

import json
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fedctl.admin import Admin, list_records
from fedctl.documents import run_document
from fedctl.following import follow_run
from fedctl.render import Output, console, note, print_json
from fedctl.run_view import change_line, run_renderable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fedcore.v1 import admin_pb2


class LiveRun:
    """What the live view shows now: the newest message, the rounds so far, the state of the connection."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self._records = {record["round"]: record for record in records}
        self._run: admin_pb2.Run | None = None
        self.connection = ""

    def update(self, run: "admin_pb2.Run") -> None:
        """Take in a message."""
        self._run = run
        if run.last_round_json:
            record = json.loads(run.last_round_json)
            self._records[record["round"]] = record

    def render(self) -> "RenderableType":
        """The view as of now."""
        if self._run is None:
            return self.connection or "connecting ..."
        history = [record for _, record in sorted(self._records.items())]
        return run_renderable(self._run, history, datetime.now(UTC), self.connection)


def watch_run(admin: Admin, run: str, output: Output) -> "admin_pb2.Run":
    """Show a run until it has ended, in the form asked for, and return its last state.

    A table is live where stdout is a terminal and one line per change elsewhere; json and jsonl are one
    object per change. Raises what `follow_run` raises.
    """
    if output is not Output.TABLE:
        return _watch_documents(admin, run)
    if not sys.stdout.isatty():
        return watch_lines(admin, run, print_line=_print_stdout)
    return watch_live(admin, run, console())


def watch_lines(admin: Admin, run: str, *, print_line: Any) -> "admin_pb2.Run":
    """Print one line for each change that is worth telling; progress within a stage is not."""
    told = ""
    last = None
    for last in follow_run(admin, run, on_trouble=lambda text: note(text or "connected again")):
        line = change_line(last)
        if line != told:
            print_line(line)
            told = line
    assert last is not None, "a stream that ends without a final state is opened again"
    return last


def watch_live(admin: Admin, run: str, screen: Any) -> "admin_pb2.Run":
    """Keep a live view on a terminal; `screen` is its rich Console."""
    from rich.live import Live

    view = LiveRun(list_records(admin, run))
    last = None

    def trouble(text: str) -> None:
        view.connection = text

    with Live(get_renderable=view.render, console=screen, refresh_per_second=4) as live:
        for last in follow_run(admin, run, on_trouble=trouble):
            view.update(last)
        live.refresh()
    assert last is not None, "a stream that ends without a final state is opened again"
    return last


def _watch_documents(admin: Admin, run: str) -> "admin_pb2.Run":
    last = None
    for last in follow_run(admin, run, on_trouble=lambda text: note(text or "connected again")):
        print_json(run_document(last), compact=True)
    assert last is not None, "a stream that ends without a final state is opened again"
    return last


def _print_stdout(line: str) -> None:
    print(f"{datetime.now(UTC):%H:%M:%S} {line}", flush=True)
