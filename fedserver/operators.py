"""`fedserver operator`: a credential for an operator, made on the coordinator's machine.

The way back in when an operator's certificate has ended, was revoked or its key was lost, and the way to a second
operator. It needs the home's files, not a running coordinator, and works beside one.
"""

import sqlite3
from datetime import datetime
from pathlib import Path

from fedcore.audit import Fact
from fedcore.audit_store import AuditLog
from fedcore.credential import join_address, write_credential
from fedcore.database import open_database
from fedcore.errors import ConfigError, ConflictError
from fedcore.identity import Subject, is_name
from fedcore.pki import new_key, serial_text
from fedserver.authority import load_authority
from fedserver.checks import load_home
from fedserver.config import ServerHome
from fedserver.registry import record_certificate
from fedserver.schema import MIGRATIONS


def make_operator(home: Path, operator: str, out: Path, now: datetime) -> datetime:
    """Write the credential folder `out` for `operator`; gives the end of its certificate.

    Raises ConfigError for a name that is not allowed or a home that is none, ConflictError if `out` is there,
    IdentityError if the issuing CA has ended.
    """
    if not is_name(operator):
        raise ConfigError(
            f"{operator!r:.80} is not an operator's name",
            hint="lower-case letters, digits, '.', '_' and '-', 63 at most, first and last a letter or digit",
        )
    if out.exists():
        raise ConflictError(f"{out} is already there", hint="give another --out")
    config, places = load_home(home), ServerHome(home)
    authority = load_authority(places.pki, config.name, config.certificates.lifetimes())
    subject, key = Subject(config.name, "operator", operator), new_key()
    chain = authority.issue(subject, key.public_key(), now)
    database = open_database(places.database, MIGRATIONS)
    try:
        fact = Fact(
            "operator.create",
            "coordinator's machine",
            object=f"operator/{operator}",
            detail={"serial": serial_text(chain[0])},
        )

        def write(connection: sqlite3.Connection) -> None:
            record_certificate(connection, chain[0], subject, now)
            AuditLog(database).append(connection, fact)

        database.write_now(write)
    finally:
        database.close()
    write_credential(
        out,
        coordinator=join_address(config.host.strip("[]"), config.port),
        subject=subject,
        key=key,
        chain=chain,
        roots=authority.roots,
    )
    return chain[0].not_valid_after_utc
