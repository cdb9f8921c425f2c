"""What each kind of log record does to the catalog."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from adapterkit.registry.errors import DamagedError
from adapterkit.registry.indexing import ReadBlob, index_manifest, index_names, put
from adapterkit.registry.log import Record
from adapterkit.registry.metrics import parse_metrics
from adapterkit.registry.versions import is_release, sort_key

if TYPE_CHECKING:
    from sqlite_utils import Database


def apply(db: Database, record: Record, read: ReadBlob) -> None:
    """`read` gives the bytes of a blob and raises DamagedError. Called in a transaction."""
    change = CHANGES.get(record.kind)
    if change is None:
        raise DamagedError(
            f"line {record.seq} of the log is of kind {record.kind!r}, which is unknown",
            hint="a newer adapterkit wrote it: upgrade this one",
        )
    try:
        change(db, record, read)
        name = "" if record.kind == "gc" else record.payload["name"]
        event = {"seq": record.seq, "name": name, "kind": record.kind}
        event |= {"created": record.time, "author": record.author}
        put(db, "events", event | {"payload": json.dumps(record.payload, sort_keys=True)})
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"line {record.seq} of the log lacks what its kind needs") from error


def _version(db: Database, record: Record, read: ReadBlob) -> None:
    given = record.payload
    row = {
        "name": given["name"],
        "sort": sort_key(given["version"]),
        "version": given["version"],
        "id": given["id"],
        "is_release": is_release(given["version"]),
        "created": record.time,
        "author": record.author,
        "removed": None,
    }
    put(db, "versions", row)
    index_manifest(db, given["id"], read)
    for tag in given["tags"]:
        put(db, "tags", {"name": given["name"], "tag": tag, "sort": row["sort"]})
    for entry in sorted(given["attachments"], key=lambda e: (e["kind"], e["name"])):
        _attach(db, record, given["id"], entry, read)


def _tag(db: Database, record: Record, read: ReadBlob) -> None:
    given = record.payload
    row = {"name": given["name"], "tag": given["tag"], "sort": sort_key(given["version"])}
    put(db, "tags", row)


def _untag(db: Database, record: Record, read: ReadBlob) -> None:
    given = record.payload
    db.execute("DELETE FROM tags WHERE name = ? AND tag = ?", [given["name"], given["tag"]])


def _tombstone(db: Database, record: Record, read: ReadBlob) -> None:
    key = [record.payload["name"], sort_key(record.payload["version"])]
    db.execute("UPDATE versions SET removed = ? WHERE name = ? AND sort = ?", [record.time, *key])
    db.execute("DELETE FROM tags WHERE name = ? AND sort = ?", key)


def _attachment(db: Database, record: Record, read: ReadBlob) -> None:
    _attach(db, record, record.payload["id"], record.payload["attachment"], read)


def _attach(
    db: Database, record: Record, subject: str, entry: Mapping[str, Any], read: ReadBlob
) -> None:
    row = {name: entry[name] for name in ("kind", "name", "digest", "size")}
    row |= {"seq": record.seq, "subject": subject, "created": record.time, "author": record.author}
    put(db, "attachments", row)
    if entry["kind"] in INDEXED:
        # One that is lost is found again, and reported, by whoever reads it.
        with suppress(DamagedError):
            INDEXED[entry["kind"]](db, subject, read(entry["digest"]))


def _note(db: Database, subject: str, data: bytes) -> None:
    db.execute(
        "UPDATE search SET notes = notes || ' ' || ?"
        " WHERE rowid = (SELECT rowid FROM manifests WHERE id = ?)",
        [data.decode(errors="replace"), subject],
    )


def _metrics(db: Database, subject: str, data: bytes) -> None:
    for name, value in parse_metrics(data).items():
        put(db, "metrics", {"subject": subject, "name": name, "value": float(value)})


INDEXED = {"note": _note, "metrics": _metrics}


def _yank(db: Database, record: Record, read: ReadBlob) -> None:
    given = record.payload
    reason = given["reason"] if given["yanked"] else None
    key = [given["name"], sort_key(given["version"])]
    db.execute("UPDATE versions SET yanked = ? WHERE name = ? AND sort = ?", [reason, *key])


def _protect(db: Database, record: Record, read: ReadBlob) -> None:
    row = {"name": record.payload["name"], "tag": record.payload["tag"]}
    if record.payload["protected"]:
        put(db, "protected", row)
    else:
        db.execute("DELETE FROM protected WHERE name = ? AND tag = ?", list(row.values()))


def _rename(db: Database, record: Record, read: ReadBlob) -> None:
    """Everything of the old name is the new one's, its history too; old names lead to it."""
    old, new = record.payload["previous"], record.payload["name"]
    for table in ("versions", "tags", "protected", "events"):
        db.execute(f"UPDATE {table} SET name = ? WHERE name = ?", [new, old])
    db.execute("DELETE FROM redirects WHERE name = ?", [new])
    db.execute("UPDATE redirects SET target = ? WHERE target = ?", [new, old])
    put(db, "redirects", {"name": old, "target": new})
    for row in db.execute("SELECT DISTINCT id FROM versions WHERE name = ?", [new]).fetchall():
        index_names(db, row[0])


def _gc(db: Database, record: Record, read: ReadBlob) -> None:
    """Only blobs that no version needs were taken away."""
    if not isinstance(record.payload["epoch"], int):
        raise TypeError("an epoch is a number")


CHANGES: dict[str, Callable[[Database, Record, ReadBlob], None]] = {
    "version": _version,
    "tag": _tag,
    "untag": _untag,
    "tombstone": _tombstone,
    "attachment": _attachment,
    "yank": _yank,
    "protect": _protect,
    "rename": _rename,
    "gc": _gc,
}
