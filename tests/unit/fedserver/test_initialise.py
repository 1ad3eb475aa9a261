"""A new federation: complete, private, and never over an old one."""

import asyncio
import re
import stat
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedcore.config import load_config
from fedcore.credential import load_credential
from fedcore.database import open_database
from fedcore.enrollment_token import decode_token
from fedcore.errors import (
    ConfigError,
    ConflictError,
    IdentityError,
    PermissionDeniedError,
    TokenError,
)
from fedcore.identity import Subject
from fedcore.pki import make_request, new_key
from fedserver.authority import create_authority, load_authority
from fedserver.checks import check_home
from fedserver.config import ServerConfig, ServerHome
from fedserver.initialise import initialise
from fedserver.registry import Registry
from fedserver.schema import MIGRATIONS
from fedserver.tokens import Tokens

NOW = datetime(2026, 5, 1, tzinfo=UTC)
TERMS = {"name": "lab", "host": "fed.example.org", "port": 9443, "enroll_port": 9444, "now": NOW}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_commented_settings_are_the_defaults(tmp_path):
    path = initialise(tmp_path / "home", **TERMS).home.config
    before = load_config(path, ServerConfig)
    text = path.read_text()
    uncommented = re.sub(r"(?m)^# (?=\[|\w+ = )", "", text)
    assert uncommented.count("\n[") == 6
    path.write_text(uncommented)
    assert load_config(path, ServerConfig) == before


def test_a_new_home_is_complete_and_private(tmp_path):
    made = initialise(tmp_path / "home", **TERMS)
    home = ServerHome(tmp_path / "home")
    config = load_config(home.config, ServerConfig)
    assert (config.name, config.host, config.port, config.enroll_port) == (
        "lab",
        "fed.example.org",
        9443,
        9444,
    )
    assert made.coordinator == "fed.example.org:9443"
    assert load_credential(home.credential, NOW).subject == Subject("lab", "coordinator", "")
    operator = load_credential(home.operator, NOW)
    assert operator.subject == Subject("lab", "operator", "admin")
    assert operator.coordinator == made.coordinator
    assert load_authority(home.pki, "lab").root_fingerprint == made.ca_fingerprint
    assert stat.S_IMODE(home.root.stat().st_mode) == 0o700
    for key in home.root.rglob("*.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        assert stat.S_IMODE(key.parent.stat().st_mode) == 0o700
    assert len(list(check_home(home.root, NOW))) == 4
    database = open_database(home.database, MIGRATIONS)
    roles = database.read(
        lambda c: [r["role"] for r in c.execute("SELECT role FROM certificates ORDER BY role")]
    )
    database.close()
    assert roles == ["coordinator", "operator"]


def test_the_root_key_may_be_taken_away(tmp_path):
    initialise(tmp_path / "home", **TERMS)
    (tmp_path / "home/pki/root.key").unlink()
    authority = load_authority(tmp_path / "home/pki", "lab")
    chain = authority.issue(Subject("lab", "site", "a"), new_key().public_key(), NOW)
    assert len(chain) == 2


def test_an_existing_home_is_refused_and_untouched(tmp_path):
    initialise(tmp_path / "home", **TERMS)
    before = snapshot(tmp_path / "home")
    with pytest.raises(ConflictError, match="not empty"):
        initialise(tmp_path / "home", **TERMS)
    assert snapshot(tmp_path / "home") == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConflictError, match="not a folder"):
        initialise(tmp_path / "file", **TERMS)


def test_an_empty_folder_is_a_good_home(tmp_path):
    (tmp_path / "home").mkdir()
    initialise(tmp_path / "home", **TERMS)
    assert (tmp_path / "home/fedserver.toml").is_file()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "My Lab"}, "'name'"),
        ({"host": "http://x"}, "neither a DNS name"),
        ({"host": ""}, "'host'"),
        ({"port": 0}, "'port'"),
        ({"enroll_port": 9443}, "expected two ports"),
    ],
)
def test_wrong_values_leave_nothing_behind(tmp_path, change, reason):
    with pytest.raises(ConfigError, match=reason):
        initialise(tmp_path / "home", **{**TERMS, **change})
    assert list(tmp_path.iterdir()) == []


def test_an_init_that_was_killed_is_told(tmp_path):
    script = f"""
import os
from datetime import UTC, datetime
from pathlib import Path
from fedserver import initialise as module
module.write_credential = lambda *a, **k: os._exit(9)  # dies in the middle, without any clean-up
home = Path({str(tmp_path / "home")!r})
module.initialise(home, name="lab", host="h", port=1, enroll_port=2, now=datetime.now(UTC))
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    with pytest.raises(ConflictError, match="interrupted") as caught:
        initialise(tmp_path / "home", **TERMS)
    assert "remove" in caught.value.hint
    with pytest.raises(ConfigError, match="no coordinator's home"):
        list(check_home(tmp_path / "home", NOW))


def test_the_authority_certifies_its_own_federation_while_its_ca_lasts(tmp_path):
    authority = create_authority(tmp_path / "pki", "lab", NOW)
    key = new_key().public_key()
    with pytest.raises(IdentityError, match="this is 'lab'"):
        authority.issue(Subject("other", "site", "a"), key, NOW)
    with pytest.raises(IdentityError, match="issuing CA: certificate ended"):
        authority.issue(Subject("lab", "site", "a"), key, NOW + timedelta(days=366))
    with pytest.raises(ConflictError, match="never overwritten"):
        create_authority(tmp_path / "pki", "lab", NOW)


def test_redeeming_is_all_or_nothing(tmp_path):
    authority = create_authority(tmp_path / "pki", "lab", NOW)
    database = open_database(tmp_path / "a.db", MIGRATIONS, create=True)
    registry = Registry(database)
    tokens = Tokens(database, lambda: authority, coordinator="c:1", enroll_port=2, clock=lambda: NOW)
    csr = make_request(new_key(), "clinic-a").decode()

    async def scenario() -> None:
        new = await tokens.create("clinic-a", 60)
        token = decode_token(new.token)
        assert (token.site, token.port, new.expires_at) == ("clinic-a", 2, NOW + timedelta(seconds=60))
        stored = database.read(lambda c: c.execute("SELECT * FROM tokens").fetchone())
        assert token.secret.encode() not in b"".join(str(value).encode() for value in tuple(stored))
        with pytest.raises(IdentityError, match="certificate request"):
            await tokens.redeem(token.id, token.secret, "rubbish")
        assert registry.sites() == []
        both = await asyncio.gather(
            *(tokens.redeem(token.id, token.secret, csr) for _ in range(2)), return_exceptions=True
        )
        assert sorted(type(one).__name__ for one in both) == ["Redeemed", "TokenError"]
        assert [row.id for row in registry.sites()] == ["clinic-a"]
        assert len(database.read(lambda c: c.execute("SELECT * FROM certificates").fetchall())) == 1
        for site, ttl_s in (("Clinic", 60), ("a", 0), ("a", -1), ("a", float("nan")), ("a", 8 * 86400)):
            with pytest.raises(ConfigError):
                await tokens.create(site, ttl_s)
        with pytest.raises(PermissionDeniedError, match="not in this coordinator's registry"):
            registry.check_admitted("clinic-z")
        registry.check_admitted("clinic-a")
        await registry.touch("clinic-a", NOW)
        assert registry.site("clinic-a").last_seen == "2026-05-01T00:00:00.000000Z"
        with pytest.raises(TokenError, match="not known"):
            await tokens.redeem("", "", csr)

    asyncio.run(scenario())
    database.close()
