"""What operators decide about a site: kept over restarts, and what registry, rounds and the site itself make of it."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedcore.database import Database, open_database
from fedcore.errors import ConflictError, NotFoundError, PermissionDeniedError
from fedserver.registry import Registry, enrol
from fedserver.schema import MIGRATIONS
from fedserver.standing import Decision, Standing

NOW = datetime(2026, 5, 1, tzinfo=UTC)
LATER = datetime(2026, 5, 2, tzinfo=UTC)


async def decide(registry: Registry, standing: Standing, reason: str = "", now: datetime = NOW) -> Decision:
    row = await registry.decide("a", standing, by="ann", reason=reason, now=now)
    return row.decision


async def registry_with(database: Database, *sites: str) -> Registry:
    for site in sites:
        await database.write(lambda c, site=site: enrol(c, site, NOW))
    return Registry(database)


def test_a_standing_outlasts_a_restart_and_is_what_everybody_goes_by(tmp_path: Path) -> None:
    async def before() -> None:
        database = open_database(tmp_path / "db", MIGRATIONS, create=True)
        registry = await registry_with(database, "a", "b")
        assert (registry.enabled_sites(), registry.withheld()) == (["a", "b"], {})
        await decide(registry, Standing.DRAINING)
        assert registry.withheld()["a"].at_once is False
        registry.check_admitted("a")
        await decide(registry, Standing.DISABLED, "MRI upgrade")
        database.close()

    asyncio.run(before())
    database = open_database(tmp_path / "db", MIGRATIONS)
    registry = Registry(database)
    said = "disabled by operator ann since 2026-05-01T00:00:00Z: MRI upgrade"
    assert str(registry.site("a").decision) == said
    assert registry.enabled_sites() == ["b"]
    assert (registry.withheld()["a"].reason, registry.withheld()["a"].at_once) == (said, True)
    with pytest.raises(PermissionDeniedError, match=f"site a is {said}"):
        registry.check_admitted("a")
    assert asyncio.run(decide(registry, Standing.ENABLED)).standing is Standing.ENABLED
    registry.check_admitted("a")
    database.close()


def test_what_can_not_be_decided_is_a_conflict_and_repeating_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        database = open_database(tmp_path / "db", MIGRATIONS, create=True)
        registry = await registry_with(database, "a")
        first = await decide(registry, Standing.DISABLED, "x")
        assert await decide(registry, Standing.DISABLED, now=LATER) == first
        assert (await decide(registry, Standing.DISABLED, "y", LATER)).reason == "y"
        with pytest.raises(ConflictError, match="no work to finish"):
            await decide(registry, Standing.DRAINING)
        with pytest.raises(NotFoundError):
            await registry.decide("z", Standing.DISABLED, by="ann", reason="", now=NOW)
        await decide(registry, Standing.REMOVED)
        for standing in (Standing.ENABLED, Standing.DRAINING, Standing.DISABLED):
            with pytest.raises(ConflictError, match="was removed") as refused:
                await decide(registry, standing)
            assert "enroll token create --site a" in refused.value.hint
        database.close()

    asyncio.run(scenario())


def test_a_removed_site_is_out_of_sight_with_its_tokens_void_until_it_enrols_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        database = open_database(tmp_path / "db", MIGRATIONS, create=True)
        registry = await registry_with(database, "a", "b")
        for site in ("a", "b"):
            await database.write(
                lambda c, site=site: c.execute(
                    "INSERT INTO tokens (id, secret_sha256, site, created_at, created_by, expires_at)"
                    " VALUES (?, x'00', ?, '', '', '2027-01-01T00:00:00.000000Z')",
                    (site, site),
                )
            )
        await decide(registry, Standing.REMOVED)
        assert [row.id for row in registry.sites()] == ["b"]
        assert [row.id for row in registry.sites(removed=True)] == ["a", "b"]
        rows = database.read(
            lambda c: c.execute("SELECT site, expires_at FROM tokens ORDER BY site").fetchall()
        )
        assert [row["expires_at"][:4] for row in rows] == ["2026", "2027"]
        await database.write(lambda c: enrol(c, "a", LATER))
        row = registry.site("a")
        assert (row.enabled, row.enrolled_at[:10], str(row.decision)) == (True, "2026-05-01", "enabled")
        await decide(registry, Standing.DISABLED)
        await database.write(lambda c: enrol(c, "a", LATER))
        assert registry.site("a").decision.standing is Standing.DISABLED, "enrolling does not let it in"
        database.close()

    asyncio.run(scenario())


def test_a_database_of_the_version_before_keeps_who_was_disabled(tmp_path: Path) -> None:
    version = next(n for n, text in enumerate(MIGRATIONS) if "ADD COLUMN standing " in text)
    database = open_database(tmp_path / "db", MIGRATIONS[:version], create=True)
    asyncio.run(
        database.write(
            lambda c: c.execute(
                "INSERT INTO sites (id, enrolled_at, enabled) VALUES ('a', '', 0), ('b', '', 1)"
            )
        )
    )
    database.close()
    database = open_database(tmp_path / "db", MIGRATIONS)
    rows = {row.id: str(row.decision) for row in Registry(database).sites()}
    assert rows == {"a": "disabled", "b": "enabled"}
    database.close()
