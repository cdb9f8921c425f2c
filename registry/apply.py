"""What each kind of log record does to the catalog."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from adapterkit.registry.errors import DamagedError
from adapterkit.registry.indexing import index_manifest
from adapterkit.registry.log import Record
from adapterkit.registry.metrics import parse_metrics
from adapterkit.registry.tables import Tables
from adapterkit.registry.versions import is_release, sort_key

_SORTED = json.JSONEncoder(sort_keys=True)


def apply(tables: Tables, record: Record) -> None:
    """Called in a transaction."""
    change = CHANGES.get(record.kind)
    if change is None:
        raise DamagedError(
            f"line {record.seq} of the log is of kind {record.kind!r}, which is unknown",
            hint="a newer adapterkit wrote it: upgrade this one",
        )
    try:
        change(tables, record)
        name = "" if record.kind == "gc" else record.payload["name"]
        event = {"seq": record.seq, "name": name, "kind": record.kind}
        event |= {"created": record.time, "author": record.author}
        tables.put("events", event | {"payload": _SORTED.encode(record.payload)})
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"line {record.seq} of the log lacks what its kind needs") from error


def _version(tables: Tables, record: Record) -> None:
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
    tables.put("versions", row)
    index_manifest(tables, given["id"])
    for tag in given["tags"]:
        tables.put("tags", {"name": given["name"], "tag": tag, "sort": row["sort"]})
    for entry in sorted(given["attachments"], key=lambda e: (e["kind"], e["name"])):
        _attach(tables, record, given["id"], entry)


def _tag(tables: Tables, record: Record) -> None:
    given = record.payload
    row = {"name": given["name"], "tag": given["tag"], "sort": sort_key(given["version"])}
    tables.put("tags", row)


def _untag(tables: Tables, record: Record) -> None:
    given = record.payload
    key = [given["name"], given["tag"]]
    tables.change("tags", "DELETE FROM tags WHERE name = ? AND tag = ?", key)


def _tombstone(tables: Tables, record: Record) -> None:
    key = [record.payload["name"], sort_key(record.payload["version"])]
    removed = "UPDATE versions SET removed = ? WHERE name = ? AND sort = ?"
    tables.change("versions", removed, [record.time, *key])
    tables.change("tags", "DELETE FROM tags WHERE name = ? AND sort = ?", key)


def _attachment(tables: Tables, record: Record) -> None:
    _attach(tables, record, record.payload["id"], record.payload["attachment"])


def _attach(tables: Tables, record: Record, subject: str, entry: Mapping[str, Any]) -> None:
    row = {name: entry[name] for name in ("kind", "name", "digest", "size")}
    row |= {"seq": record.seq, "subject": subject, "created": record.time, "author": record.author}
    tables.put("attachments", row)
    if entry["kind"] == "note":
        tables.reword(subject)
    elif entry["kind"] == "metrics":
        # Those that are lost are found again, and reported, by whoever reads them.
        with suppress(DamagedError):
            for name, value in parse_metrics(tables.read(entry["digest"])).items():
                cells = {"subject": subject, "name": name, "value": float(value)}
                tables.put("metrics", cells)


def _yank(tables: Tables, record: Record) -> None:
    given = record.payload
    reason = given["reason"] if given["yanked"] else None
    key = [given["name"], sort_key(given["version"])]
    yanked = "UPDATE versions SET yanked = ? WHERE name = ? AND sort = ?"
    tables.change("versions", yanked, [reason, *key])


def _protect(tables: Tables, record: Record) -> None:
    row = {"name": record.payload["name"], "tag": record.payload["tag"]}
    if record.payload["protected"]:
        tables.put("protected", row)
    else:
        free = "DELETE FROM protected WHERE name = ? AND tag = ?"
        tables.change("protected", free, list(row.values()))


def _rename(tables: Tables, record: Record) -> None:
    """Everything of the old name is the new one's, its history too; old names lead to it."""
    old, new = record.payload["previous"], record.payload["name"]
    for table in ("versions", "tags", "protected", "events"):
        tables.change(table, f"UPDATE {table} SET name = ? WHERE name = ?", [new, old])
    tables.change("redirects", "DELETE FROM redirects WHERE name = ?", [new])
    tables.change("redirects", "UPDATE redirects SET target = ? WHERE target = ?", [new, old])
    tables.put("redirects", {"name": old, "target": new})
    for row in tables.rows("SELECT DISTINCT id FROM versions WHERE name = ?", [new]):
        tables.reword(row[0])


def _gc(tables: Tables, record: Record) -> None:
    """Only blobs that no version needs were taken away."""
    if not isinstance(record.payload["epoch"], int):
        raise TypeError("an epoch is a number")


CHANGES: dict[str, Callable[[Tables, Record], None]] = {
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
