"""The catalog's schema, as numbered steps. A step that was released never changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterkit.registry.log import NO_DIGEST

if TYPE_CHECKING:
    from sqlite_utils import Database

_FIRST = (
    "CREATE TABLE place (one INTEGER PRIMARY KEY CHECK (one = 1), log_offset INTEGER NOT NULL,"
    " start INTEGER NOT NULL, seq INTEGER NOT NULL, digest TEXT NOT NULL)",
    f"INSERT INTO place VALUES (1, 0, 0, 0, '{NO_DIGEST}')",
    "CREATE TABLE manifests (id TEXT PRIMARY KEY, data BLOB NOT NULL, size INTEGER NOT NULL,"
    " n_files INTEGER NOT NULL, kind TEXT NOT NULL, rank INTEGER, targets TEXT NOT NULL,"
    " format TEXT NOT NULL, base TEXT NOT NULL, revision TEXT NOT NULL,"
    " quantization TEXT NOT NULL, damaged TEXT NOT NULL)",
    "CREATE TABLE files (id TEXT NOT NULL, path TEXT NOT NULL, digest TEXT NOT NULL,"
    " size INTEGER NOT NULL, role TEXT NOT NULL, PRIMARY KEY (id, path)) WITHOUT ROWID",
    "CREATE INDEX files_digest ON files (digest)",
    "CREATE TABLE edges (child TEXT NOT NULL, parent TEXT NOT NULL, relation TEXT NOT NULL,"
    " PRIMARY KEY (child, parent, relation)) WITHOUT ROWID",
    "CREATE INDEX edges_parent ON edges (parent)",
    "CREATE TABLE versions (name TEXT NOT NULL, sort TEXT NOT NULL, version TEXT NOT NULL,"
    " id TEXT NOT NULL, is_release INTEGER NOT NULL, created TEXT NOT NULL, author TEXT NOT NULL,"
    " removed TEXT, PRIMARY KEY (name, sort)) WITHOUT ROWID",
    "CREATE INDEX versions_id ON versions (id)",
    "CREATE TABLE tags (name TEXT NOT NULL, tag TEXT NOT NULL, sort TEXT NOT NULL,"
    " PRIMARY KEY (name, tag)) WITHOUT ROWID",
    "CREATE INDEX tags_version ON tags (name, sort)",
    "CREATE TABLE attachments (seq INTEGER NOT NULL, subject TEXT NOT NULL, kind TEXT NOT NULL,"
    " name TEXT NOT NULL, digest TEXT NOT NULL, size INTEGER NOT NULL, created TEXT NOT NULL,"
    " author TEXT NOT NULL, PRIMARY KEY (subject, kind, name, digest)) WITHOUT ROWID",
    "CREATE INDEX attachments_digest ON attachments (digest)",
    "CREATE TABLE events (seq INTEGER PRIMARY KEY, name TEXT NOT NULL, kind TEXT NOT NULL,"
    " created TEXT NOT NULL, author TEXT NOT NULL, payload TEXT NOT NULL)",
    "CREATE INDEX events_name ON events (name)",
    "CREATE TABLE stamps (digest TEXT PRIMARY KEY, size INTEGER NOT NULL,"
    " mtime_ns INTEGER NOT NULL, inode INTEGER NOT NULL) WITHOUT ROWID",
    # rowid: that of the manifest
    "CREATE VIRTUAL TABLE search USING fts5 (names, targets, notes, base)",
)

_TABLES = (
    *("manifests", "files", "edges", "versions", "tags", "attachments", "events", "stamps"),
)
_ANEW = (
    *(f"DELETE FROM {table}" for table in _TABLES),
    f"UPDATE place SET log_offset = 0, start = 0, seq = 0, digest = '{NO_DIGEST}'",
)
# What is new is found in the log: so everything is read from it again.
_SECOND = (
    "ALTER TABLE versions ADD COLUMN yanked TEXT",
    "ALTER TABLE manifests ADD COLUMN variant TEXT NOT NULL DEFAULT ''",
    "CREATE TABLE protected (name TEXT NOT NULL, tag TEXT NOT NULL, PRIMARY KEY (name, tag))"
    " WITHOUT ROWID",
    "CREATE TABLE redirects (name TEXT PRIMARY KEY, target TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE metrics (subject TEXT NOT NULL, name TEXT NOT NULL, value REAL NOT NULL,"
    " PRIMARY KEY (subject, name)) WITHOUT ROWID",
    "CREATE INDEX metrics_name ON metrics (name)",
    "DROP TABLE search",
    # rowid: that of the manifest
    "CREATE VIRTUAL TABLE search USING fts5 (names, targets, notes, base, card)",
    "INSERT INTO search (search, rank) VALUES ('rank', 'bm25(10.0, 3.0, 3.0, 3.0, 1.0)')",
    "CREATE INDEX files_size ON files (size)",
    *_ANEW,
)

# Words are made of the other tables, and of what the attachments are now.
_THIRD = (
    *(f"DELETE FROM {table}" for table in ("tags", "protected", "redirects", "metrics", "search")),
    *_ANEW,
)

STEPS: tuple[tuple[str, ...], ...] = (_FIRST, _SECOND, _THIRD)


def migrate(db: Database, have: int) -> None:
    """Take the steps after number `have`, inside the caller's transaction."""
    for number, step in enumerate(STEPS[have:], start=have + 1):
        for statement in step:
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {number}")
