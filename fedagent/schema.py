"""The agent's database, as numbered migrations: position in the list is the version.

Never edit one that shipped.
"""

from fedcore.audit_store import AUDIT_SCHEMA

MIGRATIONS: tuple[str, ...] = (
    AUDIT_SCHEMA,
    # Terms of the coordinator that this site has followed, each with the head of the coordinator's audit log that was kept
    # before, and the one that it came back with (docs/adr/0006-terms.md).
    """
    CREATE TABLE coordinator_terms (
        number INTEGER NOT NULL,
        began_ms INTEGER NOT NULL,
        followed_at TEXT NOT NULL,
        head_before TEXT NOT NULL,
        head_after TEXT NOT NULL,
        PRIMARY KEY (number, began_ms)
    ) STRICT;
    """,
)
