"""What helps to find a fault, as named files: versions, configuration, health, logs, threads, database, runs, sites.

None is meant to hold a secret, an image or an impression; all go through `Redactor` besides.
"""

import json
import sqlite3
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog
from google.protobuf.json_format import MessageToDict

from fedcore.compute_host import ComputeHost
from fedcore.database import Database
from fedcore.software import software
from fedcore.thread_dump import task_dump, thread_dump
from fedserver.certificates import Certificates
from fedserver.config import ServerConfig
from fedserver.effective_config import settings_of
from fedserver.event_text import event_message
from fedserver.health_facts import HealthFacts
from fedserver.journal import Journal
from fedserver.log_tail import LogTail
from fedserver.redaction import Redactor
from fedserver.registry import Registry
from fedserver.roster import Roster
from fedserver.round_driver import RoundDriver
from fedserver.run_messages import run_message

log = structlog.get_logger(__name__)
_EVENTS = 1000
_RUNS = 50
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Examined:
    """The parts that a bundle tells of."""

    home: Path
    config: ServerConfig
    database: Database
    journal: Journal
    registry: Registry
    certificates: Certificates
    roster: Roster
    driver: RoundDriver
    compute: ComputeHost
    health: HealthFacts
    log: LogTail


class DebugBundle:
    """Makes the files, one at a time. A part that fails says so in its file, and the others come all the same."""

    def __init__(self, examined: Examined) -> None:
        self._examined = examined

    async def pieces(self) -> AsyncIterator[tuple[str, bytes]]:
        """(name, bytes) in order; a large file in several pieces, one after the other."""
        redactor = Redactor.of_home(self._examined.home)
        async for name, content in self._files():
            data = redactor.clean(content.encode("utf-8", "backslashreplace"))
            for start in range(0, max(len(data), 1), _PIECE_BYTES):
                yield name, data[start : start + _PIECE_BYTES]

    async def _files(self) -> AsyncIterator[tuple[str, str]]:
        e = self._examined
        # Threads first: what follows moves them.
        yield "threads-control.txt", _tried(lambda: thread_dump() + task_dump())
        yield "threads-compute.txt", await e.compute.dump_threads()
        yield "versions.json", _tried(lambda: _json({**software(), "at": datetime.now(UTC).isoformat()}))
        yield "config.json", _tried(lambda: _json([asdict(one) for one in settings_of(e.config)]))
        yield "health.json", _json([asdict(fact) for fact in await e.health.collect()])
        yield "database.json", _tried(lambda: _json(database_figures(e.database)))
        yield "sites.json", _tried(lambda: _json(self._sites()))
        yield "certificates.json", _tried(lambda: _json([asdict(row) for row in e.certificates.rows()]))
        yield "runs.json", _tried(lambda: _json(self._runs()))
        yield "events.jsonl", _tried(self._events)
        yield "log.jsonl", _tried(e.log.text)

    def _sites(self) -> list[dict[str, Any]]:
        sites = []
        for row in self._examined.registry.sites(removed=True):
            session = self._examined.roster.sessions.get(row.id)
            site = asdict(row)
            if session is not None:
                site["capabilities"] = MessageToDict(session.capabilities)
                site["progress"] = asdict(session.progress)
                site["run"] = session.run
            sites.append(site)
        return sites

    def _runs(self) -> list[dict[str, Any]]:
        driver = self._examined.driver
        return [
            MessageToDict(run_message(view, self._examined.roster, driver.waiting_for(view)))
            for view in driver.views()[-_RUNS:]
        ]

    def _events(self) -> str:
        lines = []
        for run, position, event in self._examined.journal.newest_of_all(_EVENTS):
            message = event_message(run, position, event)
            message.ClearField("body_json")
            lines.append(json.dumps(MessageToDict(message), ensure_ascii=False) + "\n")
        return "".join(lines)


def database_figures(database: Database) -> dict[str, Any]:
    """Size, schema and rows of each table."""

    def read(connection: sqlite3.Connection) -> dict[str, Any]:
        names = ("user_version", "page_count", "page_size", "freelist_count", "journal_mode")
        figures = {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names}
        tables = [
            row[0]
            for row in connection.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' ORDER BY name"
            )
        ]
        rows = {
            table: connection.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0]  # noqa: S608 - its own names
            for table in tables
        }
        return {**figures, "sqlite": sqlite3.sqlite_version, "rows": rows}

    files = sorted(database.path.parent.glob(f"{database.path.name}*"))
    return {**database.read(read), "file_bytes": {path.name: path.stat().st_size for path in files}}


def _tried(make: Callable[[], str]) -> str:
    try:
        return make()
    except Exception as error:  # whatever is broken is why somebody looks
        log.exception("a part of the debug bundle failed")
        return f"not there: {type(error).__name__}: {error}\n"


def _json(document: Any) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False, default=str) + "\n"
