"""The schema of the job store, as numbered steps. `PRAGMA user_version` counts the steps that were applied.

A step, once released, is never edited; the next change is a new step. Structured columns are JSON text, so
that `sqlite3 jobs.db` shows what is there.
"""

from __future__ import annotations

from typing import Final

MIGRATIONS: Final[tuple[str, ...]] = (
    """
    CREATE TABLE jobs (
        job_id TEXT PRIMARY KEY,
        tenant_id TEXT NOT NULL,
        node_id TEXT NOT NULL,
        attempt INTEGER NOT NULL,
        revision INTEGER NOT NULL,
        kind TEXT NOT NULL,
        effect TEXT NOT NULL,
        labels TEXT NOT NULL,
        phase TEXT NOT NULL,
        state TEXT NOT NULL,
        batch_key TEXT NOT NULL,
        grant_json TEXT,
        view TEXT NOT NULL,
        facts TEXT NOT NULL,
        request TEXT,
        intent_index INTEGER,
        outcome_index INTEGER
    ) STRICT;
    CREATE INDEX jobs_of_tenant ON jobs (tenant_id, job_id);
    CREATE INDEX jobs_open ON jobs (job_id) WHERE phase <> 'done';
    CREATE TABLE history (
        job_id TEXT NOT NULL,
        revision INTEGER NOT NULL,
        time TEXT NOT NULL,
        event TEXT NOT NULL,
        PRIMARY KEY (job_id, revision)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE blobs (
        digest TEXT PRIMARY KEY,
        data BLOB NOT NULL
    ) STRICT;
    CREATE TABLE artifacts (
        seq INTEGER PRIMARY KEY,
        tenant_id TEXT NOT NULL,
        digest TEXT NOT NULL,
        job_id TEXT NOT NULL,
        name TEXT NOT NULL,
        media_type TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        created_at TEXT NOT NULL,
        labels TEXT NOT NULL,
        UNIQUE (digest, tenant_id, job_id, name)
    ) STRICT;
    CREATE INDEX artifacts_of_tenant ON artifacts (tenant_id, seq);
    CREATE INDEX artifacts_of_job ON artifacts (job_id, seq);
    CREATE TABLE applied (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        log_index INTEGER NOT NULL
    ) STRICT;
    INSERT INTO applied VALUES (1, 0);
    """,
)
