"""The coordinator's database, as numbered migrations: position in the list is the version.

Never edit one that shipped.
"""

from fedcore.audit_store import AUDIT_SCHEMA

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
    # Certificates for years: who signed each, what it was renewed from, who ended it and why.
    """
    ALTER TABLE certificates ADD COLUMN issuer TEXT NOT NULL DEFAULT '';
    ALTER TABLE certificates ADD COLUMN renews TEXT NOT NULL DEFAULT '';
    ALTER TABLE certificates ADD COLUMN revoked_by TEXT NOT NULL DEFAULT '';
    ALTER TABLE certificates ADD COLUMN reason TEXT NOT NULL DEFAULT '';
    CREATE INDEX certificates_by_renews ON certificates (renews);
    """,
    AUDIT_SCHEMA,
    # Roles of operators. Those who were operators before there were roles could do everything.
    """
    CREATE TABLE grants (
        operator TEXT NOT NULL,
        role TEXT NOT NULL CHECK (role IN ('viewer', 'operator', 'auditor', 'owner')),
        granted_at TEXT NOT NULL,
        granted_by TEXT NOT NULL,
        PRIMARY KEY (operator, role)
    ) STRICT;
    INSERT INTO grants (operator, role, granted_at, granted_by)
        SELECT DISTINCT c.subject_id, r.role, strftime('%Y-%m-%dT%H:%M:%SZ', 'now'), 'migration'
        FROM certificates c JOIN (SELECT 'owner' AS role UNION SELECT 'operator') r
        WHERE c.role = 'operator';
    """,
    # What operators decided about each site; it takes the place of `enabled`.
    """
    ALTER TABLE sites ADD COLUMN standing TEXT NOT NULL DEFAULT 'enabled'
        CHECK (standing IN ('enabled', 'draining', 'disabled', 'removed'));
    ALTER TABLE sites ADD COLUMN standing_since TEXT NOT NULL DEFAULT '';
    ALTER TABLE sites ADD COLUMN standing_by TEXT NOT NULL DEFAULT '';
    ALTER TABLE sites ADD COLUMN standing_reason TEXT NOT NULL DEFAULT '';
    UPDATE sites SET standing = 'disabled' WHERE enabled = 0;
    ALTER TABLE sites DROP COLUMN enabled;
    """,
    # Tokens for operators too (`site` is the name, whatever the role), and requests to be let in.
    """
    ALTER TABLE tokens ADD COLUMN role TEXT NOT NULL DEFAULT 'site' CHECK (role IN ('site', 'operator'));
    CREATE TABLE enrollment_requests (
        key_fingerprint TEXT PRIMARY KEY,
        site TEXT NOT NULL,
        csr_pem TEXT NOT NULL,
        address TEXT NOT NULL,
        requested_at TEXT NOT NULL,
        expires_at TEXT NOT NULL,
        state TEXT NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'approved', 'denied')),
        decided_at TEXT NOT NULL DEFAULT '',
        decided_by TEXT NOT NULL DEFAULT '',
        reason TEXT NOT NULL DEFAULT '',
        serial TEXT NOT NULL DEFAULT '',
        chain_pem TEXT NOT NULL DEFAULT ''
    ) STRICT;
    """,
    # Terms (docs/adr/0006-terms.md). A restored coordinator is held until `released_at` is set. Of the audit log, records
    # up to `audit_sequence` were in the backup; what came after them was lost.
    """
    CREATE TABLE terms (
        number INTEGER NOT NULL CHECK (number >= 1),
        began_ms INTEGER NOT NULL,
        backup TEXT NOT NULL,
        audit_sequence INTEGER NOT NULL,
        released_at TEXT,
        PRIMARY KEY (number, began_ms)
    ) STRICT;
    INSERT INTO terms (number, began_ms, backup, audit_sequence, released_at) VALUES (1, 0, '', 0, '');
    """,
)
