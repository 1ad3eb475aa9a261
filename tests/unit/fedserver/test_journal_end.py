"""A journal that ends before what was noted of it has lost records."""

import asyncio
from pathlib import Path

from fedcore.database import open_database
from fedcore.plan import validate_plan
from fedserver import round_events as ev
from fedserver.journal import Journal
from fedserver.journal_end import JournalEnd
from fedserver.schema import MIGRATIONS

PLAN = validate_plan(
    {
        "name": "t",
        "rounds": 1,
        "strategy": "fedavg",
        "model": {"name": "cnn", "classes": 3, "input": [1, 8, 8]},
    }
)


def test_records_that_were_confirmed_and_are_gone_are_counted(tmp_path: Path) -> None:
    end = JournalEnd(tmp_path / "journal-end")
    database = open_database(tmp_path / "db", MIGRATIONS, create=True)
    try:
        assert end.lost(database) == 0, "nothing was noted yet"
        journal = Journal(database, end=end)

        async def fill() -> None:
            await journal.submit("r", PLAN, request_id=None, submitted_by="me")
            started = ev.RunStarted(at=1.0, sites=("a",), synthesises=False)
            await journal.append([("r", started), ("r", started)])

        asyncio.run(fill())
        assert (end.noted(), end.lost(database)) == (2, 0)
        database.write_now(lambda c: c.execute("DELETE FROM journal WHERE seq = 2"))
        assert end.lost(database) == 1
        assert end.lost(database) == 0, "it is told once"
    finally:
        database.close()


def test_a_note_that_cant_be_written_or_read_hinders_nothing(tmp_path: Path) -> None:
    end = JournalEnd(tmp_path)
    end.note(7)
    assert end.noted() == 0
    (tmp_path / "garbage").write_text("?")
    assert JournalEnd(tmp_path / "garbage").noted() == 0
