"""Roles of operators: granted, taken, never the last owner's; those from before there were roles keep what they could do."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fedcore.database import Database, open_database
from fedcore.errors import ConfigError, ConflictError
from fedcore.identity import Caller
from fedserver.authorisation import ANY_OPERATOR
from fedserver.grants import Grants
from fedserver.schema import MIGRATIONS

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def caller(role: str, name: str) -> Caller:
    return Caller("lab", role, name, "1", NOW)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = open_database(tmp_path / "a.db", MIGRATIONS, create=True)
    yield opened
    opened.close()


@pytest.fixture
def grants(database: Database) -> Grants:
    return Grants(database, lambda: NOW)


def test_a_grant_holds_until_it_is_revoked_and_repeating_either_changes_nothing(grants):
    ann = caller("operator", "ann")
    assert grants.roles_of(ann) == {ANY_OPERATOR}
    asyncio.run(grants.grant("ann", "viewer", "admin"))
    first = grants.rows("ann")
    asyncio.run(grants.grant("ann", "viewer", "somebody-else"))
    assert grants.rows() == first
    assert (first[0].granted_by, first[0].granted_at) == ("admin", "2026-01-01T00:00:00.000000Z")
    assert grants.roles_of(ann) == {ANY_OPERATOR, "viewer"}
    for _ in range(2):
        asyncio.run(grants.revoke("ann", "viewer"))
        assert grants.roles_of(ann) == {ANY_OPERATOR}


def test_a_site_of_an_operator_s_name_has_none_of_its_roles(grants):
    asyncio.run(grants.grant("ann", "owner", "admin"))
    assert grants.roles_of(caller("site", "ann")) == {"site"}


def test_the_last_owner_stays_one(grants):
    asyncio.run(grants.grant("ann", "owner", "init"))
    with pytest.raises(ConflictError, match="ann is the only owner"):
        asyncio.run(grants.revoke("ann", "owner"))
    asyncio.run(grants.revoke("bob", "owner"))  # is none
    asyncio.run(grants.grant("bob", "owner", "ann"))
    asyncio.run(grants.revoke("ann", "owner"))
    assert [(one.operator, one.role) for one in grants.rows()] == [("bob", "owner")]


@pytest.mark.parametrize(
    ("operator", "role"), [("", "viewer"), ("A B", "viewer"), ("ann", "site"), ("ann", "")]
)
def test_what_is_no_operator_or_no_role_is_refused(grants, operator, role):
    for change in (lambda: grants.grant(operator, role, "admin"), lambda: grants.revoke(operator, role)):
        with pytest.raises(ConfigError, match=r"is not an operator's name|is not a role"):
            asyncio.run(change())
    assert grants.rows() == []


def test_operators_from_before_there_were_roles_keep_what_they_could_do(tmp_path: Path):
    path = tmp_path / "old.db"
    with_grants = next(place for place, script in enumerate(MIGRATIONS) if "CREATE TABLE grants" in script)
    old = open_database(path, MIGRATIONS[:with_grants], create=True)
    for serial, role, owner in (
        ("1", "operator", "admin"),
        ("2", "operator", "admin"),
        ("3", "site", "ward-7"),
    ):
        old.write_now(
            lambda c, row=(serial, role, owner): c.execute(
                "INSERT INTO certificates (serial, role, subject_id, not_before, not_after, issued_at)"
                " VALUES (?, ?, ?, '', '', '')",
                row,
            )
        )
    old.close()
    new = open_database(path, MIGRATIONS)
    try:
        assert [(one.operator, one.role) for one in Grants(new).rows()] == [
            ("admin", "operator"),
            ("admin", "owner"),
        ]
    finally:
        new.close()
