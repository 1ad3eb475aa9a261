"""The journal of runs: what was submitted and everything that happened since, in SQLite. Replaying it is recovery."""

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import ValidationError

from fedcore.clock import Clock, SystemClock
from fedcore.database import Database
from fedcore.errors import ConflictError, FedimpresError, StorageError
from fedcore.plan import Plan, plan_from_json
from fedserver.journal_end import JournalEnd, last_record
from fedserver.round_events import EVENT, Event
from fedserver.round_machine import apply
from fedserver.round_state import RunState

# Facts that have become durable, and the seconds that it took.
Recorded = Callable[[Sequence[tuple[str, Event]], float], None]


@dataclass(frozen=True, slots=True)
class Submission:
    """A run as it was asked for."""

    run: str
    seq: int
    request_id: str | None
    submitted_at: str
    submitted_by: str
    plan: Plan


class Journal:
    """Submissions and events. An event is durable when `append` returns; `recorded` is told then, and how long it took."""

    def __init__(
        self,
        database: Database,
        recorded: Recorded | None = None,
        clock: Clock | None = None,
        end: JournalEnd | None = None,
    ) -> None:
        self._database = database
        self._end = end
        self._recorded = recorded
        self._clock = clock or SystemClock()

    async def submit(self, run: str, plan: Plan, *, request_id: str | None, submitted_by: str) -> Submission:
        """Record a submission and return it; the one recorded before, if the same request was.

        Raises ConflictError if that request was made with another plan.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")

        def write(connection: sqlite3.Connection) -> None:
            if request_id is not None:
                known = connection.execute(
                    "SELECT 1 FROM runs WHERE request_id = ?", (request_id,)
                ).fetchone()
                if known is not None:
                    return
            connection.execute(
                "INSERT INTO runs (run, seq, request_id, submitted_at, submitted_by, plan_json)"
                " VALUES (?, (SELECT coalesce(max(seq), 0) + 1 FROM runs), ?, ?, ?, ?)",
                (run, request_id, now, submitted_by, plan.to_json()),
            )

        await self._database.write(write)
        for submission in self.submissions():
            if submission.run == run or (request_id is not None and submission.request_id == request_id):
                if submission.plan != plan:
                    raise ConflictError(
                        f"request id {request_id!r:.80} is that of run {submission.run}, which has another plan",
                        hint="give each submission an id of its own; repeat one only to try the same again",
                    )
                return submission
        raise StorageError(f"run {run} was recorded but can't be read back")

    def submissions(self) -> list[Submission]:
        """All submissions, the oldest first. Raises StorageError if one can't be read."""
        columns = "run, seq, request_id, submitted_at, submitted_by, plan_json"
        rows = self._database.read(
            lambda c: c.execute(f"SELECT {columns} FROM runs ORDER BY seq").fetchall()  # noqa: S608
        )
        try:
            return [
                Submission(run, seq, request_id, at, by, plan_from_json(plan_json, f"run {run}"))
                for run, seq, request_id, at, by, plan_json in rows
            ]
        except FedimpresError as error:
            raise StorageError(f"journal: {error.message}") from error

    async def append(self, events: Sequence[tuple[str, Event]]) -> None:
        """Record (run, event) pairs in one transaction."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        rows = [(run, at, event.kind, event.model_dump_json()) for run, event in events]

        def write(connection: sqlite3.Connection) -> int:
            connection.executemany("INSERT INTO journal (run, at, kind, body) VALUES (?, ?, ?, ?)", rows)
            return last_record(connection)

        began = self._clock.monotonic()
        last = await self._database.write(write)
        if self._end is not None:
            self._end.note(last)
        if self._recorded is not None:
            self._recorded(events, self._clock.monotonic() - began)

    def events(self, run: str) -> list[Event]:
        """Everything that happened to a run, in order. Raises StorageError if a record can't be read."""
        return [event for _, event in self.records(run)]

    def records(self, run: str, after: int = 0, limit: int = -1) -> list[tuple[int, Event]]:
        """What happened to a run after the position `after`, in order, each with its position; at most `limit` if that
        is not negative. Raises StorageError if a record can't be read.
        """
        query = "SELECT seq, body FROM journal WHERE run = ? AND seq > ? ORDER BY seq LIMIT ?"
        rows = self._database.read(lambda c: c.execute(query, (run, after, limit)).fetchall())
        records = []
        for seq, body in rows:
            try:
                records.append((seq, EVENT.validate_json(body)))
            except ValidationError as error:
                raise StorageError(
                    f"journal record {seq} of run {run} can't be read: {error.errors()[0]['msg']}",
                    hint="restore the database from a backup",
                ) from error
        return records

    def newest(self, run: str, kinds: Sequence[str], limit: int) -> list[Event]:
        """The newest events of some kinds, at most `limit`, in order. Raises StorageError if the database fails."""
        marks = ", ".join("?" * len(kinds))
        query = f"SELECT body FROM journal WHERE run = ? AND kind IN ({marks}) ORDER BY seq DESC LIMIT ?"  # noqa: S608
        rows = self._database.read(lambda c: c.execute(query, (run, *kinds, limit)).fetchall())
        return [EVENT.validate_json(body) for (body,) in reversed(rows)]

    def newest_of_all(self, limit: int) -> list[tuple[str, int, Event]]:
        """The newest events of all runs, in order: (run, position, event). Raises StorageError if the database fails."""
        query = "SELECT run, seq, body FROM journal ORDER BY seq DESC LIMIT ?"
        rows = self._database.read(lambda c: c.execute(query, (limit,)).fetchall())
        return [(run, seq, EVENT.validate_json(body)) for run, seq, body in reversed(rows)]

    def replay(self) -> list[tuple[Submission, RunState]]:
        """Every run with its state, the oldest first."""
        return [(s, replay(s.run, s.plan, self.events(s.run))) for s in self.submissions()]


def replay(run: str, plan: Plan, events: Iterable[Event]) -> RunState:
    """The state that a run's events lead to."""
    state = RunState(run=run, plan=plan)
    for event in events:
        state = apply(state, event)
    return state
