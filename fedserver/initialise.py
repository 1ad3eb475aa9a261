"""What `fedserver init` does: a new federation in a new home.

fedserver.toml is written last. Until then the file `.initialising` marks the home, so that an init that was
killed can be told from a federation.
"""

import json
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from fedcore.credential import join_address, write_credential
from fedcore.database import open_database
from fedcore.errors import ConfigError, ConflictError
from fedcore.identity import Subject
from fedcore.pki import LOOPBACK_NAMES, new_key
from fedcore.plan import describe_problems
from fedcore.private_files import make_folder, write_file
from fedserver import registry
from fedserver.authorisation import OPERATOR, OWNER
from fedserver.authority import create_authority
from fedserver.config import ServerConfig, ServerHome
from fedserver.grants import grant
from fedserver.offline_ca import prepare_root_folder
from fedserver.schema import MIGRATIONS

FIRST_OPERATOR = "admin"
_MARK = ".initialising"


@dataclass(frozen=True, slots=True)
class Initialised:
    """A new federation. `coordinator` is the HOST:PORT that members dial."""

    home: ServerHome
    coordinator: str
    ca_fingerprint: str


def initialise(
    home: Path,
    *,
    name: str,
    host: str,
    port: int,
    enroll_port: int,
    now: datetime,
    offline_ca: Path | None = None,
) -> Initialised:
    """Make root, issuing CA, coordinator certificate, operator credential, database and configuration in
    `home`; the root's key in the folder `offline_ca` instead, if that is given.

    Both must be absent or empty. Raises ConflictError if they are not, ConfigError for values that are not
    allowed; in both cases nothing is changed. A failure on the way removes what was made in the home.
    """
    config = _validated(name, host, port, enroll_port)
    _refuse_used(home)
    if offline_ca is not None:
        if offline_ca.resolve().is_relative_to(home.resolve()):
            raise ConfigError(f"--offline-ca {offline_ca} is in the home: expected a folder to take away")
        prepare_root_folder(offline_ca)
    was_there = home.exists()
    make_folder(home)
    mark = home / _MARK
    mark.touch(mode=0o600)
    try:
        initialised = _fill(ServerHome(home), config, now, offline_ca)
    except BaseException:
        _remove(home, keep_folder=was_there)
        raise
    mark.unlink()
    return initialised


def _validated(name: str, host: str, port: int, enroll_port: int) -> ServerConfig:
    try:
        config = ServerConfig(name=name, host=host, port=port, enroll_port=enroll_port)
    except ValidationError as error:
        raise ConfigError(f"fedserver init: {describe_problems(error)}") from error
    if port == enroll_port:
        raise ConfigError(f"--port and --enroll-port are both {port}: expected two ports")
    return config


def _refuse_used(home: Path) -> None:
    if not home.exists():
        return
    if not home.is_dir():
        raise ConflictError(f"{home} is not a folder")
    if (home / _MARK).exists():
        raise ConflictError(
            f"{home}: an earlier 'fedserver init' was interrupted there",
            hint=f"remove {home} and run it again",
        )
    if any(home.iterdir()):
        raise ConflictError(
            f"{home} is not empty; nothing was changed",
            hint="give another --home, or serve this one: fedserver serve",
        )


def _fill(home: ServerHome, config: ServerConfig, now: datetime, offline_ca: Path | None) -> Initialised:
    authority = create_authority(
        home.pki, config.name, now, config.certificates.lifetimes(), root_folder=offline_ca
    )
    coordinator = join_address(config.host.strip("[]"), config.port)
    database = open_database(home.database, MIGRATIONS, create=True)
    try:
        for folder, subject, hosts in (
            (home.credential, Subject(config.name, "coordinator", ""), (config.host, *LOOPBACK_NAMES)),
            (home.operator, Subject(config.name, "operator", FIRST_OPERATOR), ()),
        ):
            key = new_key()
            chain = authority.issue(subject, key.public_key(), now, hosts=hosts)
            leaf = chain[0]
            database.write_now(
                lambda c, leaf=leaf, subject=subject: registry.record_certificate(c, leaf, subject, now)  # type: ignore[misc]
            )
            write_credential(
                folder, coordinator=coordinator, subject=subject, key=key, chain=chain, roots=authority.roots
            )
        for role in (OWNER, OPERATOR):
            database.write_now(
                lambda c, role=role: grant(c, FIRST_OPERATOR, role, now, "fedserver init")  # type: ignore[misc]
            )
    finally:
        database.close()
    make_folder(home.artifacts)
    make_folder(home.spool)
    write_file(home.config, _config_toml(config).encode())
    return Initialised(home, coordinator, authority.root_fingerprint)


def _config_toml(config: ServerConfig) -> str:
    return f"""\
# The coordinator of federation {config.name}. Checked by: fedserver check-config --home DIR
name = {json.dumps(config.name)}
# The name that sites dial; it stands in the coordinator's certificate.
host = {json.dumps(config.host)}
# Sites and operators, client certificate required.
port = {config.port}
# Enrolment of new sites, server TLS only; a firewall may close it between enrolments.
enroll_port = {config.enroll_port}
# Interface to listen on; "[::]" is all of them, IPv4 included.
listen = {json.dumps(config.listen)}
log_level = {json.dumps(config.log_level)}    # debug | info | warning | error

# [compute]
# device = {json.dumps(config.compute.device)}        # auto | cpu | cuda | cuda:N: where aggregation and synthesis run
# threads = {config.compute.threads}            # 0: PyTorch's choice

# [admission]
# max_agents = {config.admission.max_agents}
# max_transfers = {config.admission.max_transfers}      # chunks of 1 MiB that move at a time; more transfers take turns

# [limits]              # of one member; whoever asks for more is refused for a while (overloaded)
# requests_per_s = {config.limits.requests_per_s:g}
# open_streams = {config.limits.open_streams}
# transfers = {config.limits.transfers}
# spool_mib = {config.limits.spool_mib}                  # updates of a site on their way in, a model that is uploaded
# failed_enrolments_per_min = {config.limits.failed_enrolments_per_min:g}    # of one address; a good token is always taken
# enroll_requests = {config.limits.enroll_requests}              # sites that wait for approval, in all, by address, by name
# enroll_requests_per_address = {config.limits.enroll_requests_per_address}
# enroll_requests_per_site = {config.limits.enroll_requests_per_site}
# enroll_request_hours = {config.limits.enroll_request_hours:g}

# [certificates]        # all are renewed by themselves after two thirds of their life, operators' by fedctl cert renew
# site_days = {config.certificates.site_days:g}
# operator_days = {config.certificates.operator_days:g}
# coordinator_days = {config.certificates.coordinator_days:g}

# [storage]             # above it old rounds' models go; none without a number, such as: quota_gib = 200

# [metrics]             # for Prometheus, on 127.0.0.1 only; none without a port, such as: port = 9464
"""


def _remove(home: Path, *, keep_folder: bool) -> None:
    for entry in home.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    if not keep_folder:
        home.rmdir()
