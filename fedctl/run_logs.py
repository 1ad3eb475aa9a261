"""fedctl run logs: what happened to a run and why, from the coordinator's journal."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedcore.errors import UsageError
from fedctl.admin import Admin, get_run, open_admin
from fedctl.completion import RunArgument
from fedctl.documents import FINAL_STATES
from fedctl.durations import parse_duration
from fedctl.following import follow
from fedctl.render import Output, OutputOption, note, print_json

if TYPE_CHECKING:
    from fedcore.v1 import operations_pb2

_LAST = "run_finished"


def logs(
    ctx: typer.Context,
    run: RunArgument,
    follow_: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what happens, until the run is over.")
    ] = False,
    since: Annotated[
        str,
        typer.Option(help="Only what is not older: 90s, 2h, or a moment like 2026-05-01T12:00:00+02:00."),
    ] = "",
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what happened to a run, the oldest first: when, in which round, at which site, and why.

    From the journal, so all of it is there whenever one looks; -f goes on through restarts of the coordinator.
    """
    earliest = since_moment(since, datetime.now(UTC)) if since else ""
    with open_admin(ctx) as admin:
        found = get_run(admin, run)
        going_on = follow_ and found.state not in FINAL_STATES
        rows = events_of(admin, found.run, since=earliest, going_on=going_on)
        if output is Output.JSON and not going_on:
            print_json({"events": [event_document(event) for event in rows]})
            return
        for event in rows:
            if output is Output.TABLE:
                print(event_line(event), flush=True)
            else:
                print_json(event_document(event), compact=True)


def events_of(
    admin: Admin, run: str, *, since: str = "", going_on: bool = False
) -> "Iterator[operations_pb2.RunEvent]":
    """A run's events, the oldest first; with `going_on` until its end, which must be to come. Raises NotFoundError."""
    from fedcore.v1 import operations_pb2

    request = operations_pb2.WatchEventsRequest(run=run, since=since, follow=going_on)
    if not going_on:
        yield from admin.stream(lambda _: admin.operations.WatchEvents, request)
        return
    begun = False

    def updates(left_s: float | None) -> "Iterator[operations_pb2.RunEvent]":
        """What follows the last event that came."""
        nonlocal begun
        for event in admin.stream(lambda _: admin.operations.WatchEvents, request, left_s):
            if event.position or not begun:
                yield event
            begun, request.after = True, event.position

    yield from follow(
        updates, lambda event: event.kind == _LAST, f"run {run}", admin.who,
        on_trouble=lambda text: note(text or "connected again"),
    )  # fmt: skip


def event_document(event: "operations_pb2.RunEvent") -> dict[str, Any]:
    """An event as an object; `event` is what the journal holds."""
    return {
        "at": event.at,
        "kind": event.kind,
        "round": event.round or None,
        "site": event.site or None,
        "text": event.text,
        "event": json.loads(event.body_json),
    }


def event_line(event: "operations_pb2.RunEvent") -> str:
    """An event as a line for people."""
    where = [f"round {event.round}"] if event.round else []
    where += [event.site] if event.site else []
    return f"{event.at}  {' '.join(where) or 'run'}: {event.text}"


def since_moment(text: str, now: datetime) -> str:
    """`--since` as RFC 3339: a duration before `now`, or a moment. Raises UsageError."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return (now - timedelta(seconds=parse_duration(text))).isoformat()
    # Without a zone it is meant as the clock on this machine's wall says.
    moment = moment.astimezone() if moment.tzinfo is None else moment
    if moment > now:
        raise UsageError(
            f"--since {text} is yet to come", hint="give a moment that is past, or a duration: 2h"
        )
    return moment.isoformat()
