"""What `fedserver check-config` looks at: everything that `serve` needs and that can be wrong on disk."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from fedcore.config import load_config
from fedcore.credential import load_credential
from fedcore.database import open_database
from fedcore.errors import ConfigError
from fedcore.identity import Subject
from fedserver.authority import load_authority
from fedserver.config import ServerConfig, ServerHome
from fedserver.registry import Registry
from fedserver.rotation import ends_soon
from fedserver.schema import MIGRATIONS
from fedserver.terms import Terms


def load_home(home: Path) -> ServerConfig:
    """The configuration of an initialised home. Raises ConfigError that says what to do if it is not one."""
    config = ServerHome(home).config
    if not config.is_file():
        raise ConfigError(
            f"{home} is no coordinator's home: {config.name} is missing",
            hint="make one: fedserver init --home DIR --name NAME --host HOST",
        )
    return load_config(config, ServerConfig)


def check_home(home: Path, now: datetime) -> Iterator[str]:
    """Check one thing after the other, saying what was found good.

    Raises ConfigError, IdentityError or StorageError for the first thing that is not.
    """
    paths = ServerHome(home)
    config = load_home(home)
    yield f"ok  {paths.config}: federation {config.name}, {config.host}:{config.port}"
    authority = load_authority(paths.pki, config.name)
    offline = not (paths.pki / "root.key").exists()
    yield (
        f"ok  {paths.pki}: issuing CA until {authority.issuing.certificate.not_valid_after_utc:%Y-%m-%d}, "
        f"root's key {'kept elsewhere' if offline else 'here'}"
    )
    for problem in ends_soon(authority, now, offline=offline):
        yield f"bad {problem}"
    credential = load_credential(paths.credential, now, allow_expired=True)
    expected = Subject(config.name, "coordinator", "")
    if credential.subject != expected:
        raise ConfigError(
            f"{paths.credential} is of {credential.subject.spiffe_id}, expected {expected.spiffe_id}"
        )
    until = credential.certificate.not_valid_after_utc
    ended = "" if now <= until else "; it has ended, serve renews it"
    yield f"ok  {paths.credential}: certificate until {until:%Y-%m-%d}{ended}"
    database = open_database(paths.database, MIGRATIONS)
    try:
        terms = Terms(database)
        held = "; restored, serves nobody before 'fedserver release'" if terms.held() else ""
        yield f"ok  {paths.database}: {len(Registry(database).sites())} sites, {terms.current()}{held}"
    finally:
        database.close()
