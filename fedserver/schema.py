"""The coordinator's database, as numbered migrations: position in the list is the version.

Never edit one that shipped.
"""

MIGRATIONS: tuple[str, ...] = (
    """
    CREATE TABLE sites (
        id TEXT PRIMARY KEY,
        enrolled_at TEXT NOT NULL,
        enabled INTEGER NOT NULL DEFAULT 1 CHECK (enabled IN (0, 1)),
        last_seen TEXT
    ) STRICT;

    CREATE TABLE certificates (
        serial TEXT PRIMARY KEY,
        role TEXT NOT NULL CHECK (role IN ('site', 'operator', 'coordinator')),
        subject_id TEXT NOT NULL,
        not_before TEXT NOT NULL,
        not_after TEXT NOT NULL,
        issued_at TEXT NOT NULL,
        revoked_at TEXT
    ) STRICT;
    CREATE INDEX certificates_by_subject ON certificates (role, subject_id, not_after);

    CREATE TABLE tokens (
        id TEXT PRIMARY KEY,
        secret_sha256 BLOB NOT NULL,
        site TEXT NOT NULL,
        created_at TEXT NOT NULL,
        created_by TEXT NOT NULL,
        expires_at TEXT NOT NULL,
        used_at TEXT,
        serial TEXT REFERENCES certificates (serial)
    ) STRICT;

    CREATE TABLE runs (
        run TEXT PRIMARY KEY,
        seq INTEGER NOT NULL UNIQUE,
        request_id TEXT UNIQUE,
        submitted_at TEXT NOT NULL,
        submitted_by TEXT NOT NULL,
        plan_json TEXT NOT NULL
    ) STRICT;

    CREATE TABLE journal (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        run TEXT NOT NULL REFERENCES runs(run),
        at TEXT NOT NULL,
        kind TEXT NOT NULL,
        body TEXT NOT NULL
    ) STRICT;
    CREATE INDEX journal_by_run ON journal (run, seq);
    """,
)
