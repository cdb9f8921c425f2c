"""What each kind of log record does to the catalog."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.registry.errors import DamagedError
from adapterkit.registry.log import Record
from adapterkit.registry.manifest import Manifest
from adapterkit.registry.records import Facts
from adapterkit.registry.versions import is_release, sort_key

if TYPE_CHECKING:
    from sqlite_utils import Database

ReadBlob = Callable[[str], bytes]


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
        event = {"seq": record.seq, "name": record.payload["name"], "kind": record.kind}
        event |= {"created": record.time, "author": record.author}
        put(db, "events", event | {"payload": json.dumps(record.payload)})
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"line {record.seq} of the log lacks what its kind needs") from error


def put(db: Database, table: str, row: Mapping[str, object]) -> None:
    """Insert or replace; sqlite-utils' own insert would commit the transaction (before 4.0)."""
    columns = ", ".join(row)
    values = ", ".join("?" * len(row))
    db.execute(f"INSERT OR REPLACE INTO {table} ({columns}) VALUES ({values})", list(row.values()))


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
    for entry in given["attachments"]:
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
    if entry["kind"] == "note":
        try:
            text = read(entry["digest"]).decode(errors="replace")
        except DamagedError:  # found again, and reported, by whoever reads the note
            return
        db.execute(
            "UPDATE search SET notes = notes || ' ' || ?"
            " WHERE rowid = (SELECT rowid FROM manifests WHERE id = ?)",
            [text, subject],
        )


CHANGES: dict[str, Callable[[Database, Record, ReadBlob], None]] = {
    "version": _version,
    "tag": _tag,
    "untag": _untag,
    "tombstone": _tombstone,
    "attachment": _attachment,
}


def index_manifest(db: Database, id: str, read: ReadBlob) -> None:
    """Fill the rows of one manifest. One that cannot be read is listed as damaged: the others
    must stay within reach."""
    known = next(db.query("SELECT damaged FROM manifests WHERE id = ?", [id]), None)
    if known is None or known["damaged"]:
        _fill_manifest(db, id, read)
    names = [
        row["name"] for row in db.query("SELECT DISTINCT name FROM versions WHERE id = ?", [id])
    ]
    db.execute(
        "UPDATE search SET names = ? WHERE rowid = (SELECT rowid FROM manifests WHERE id = ?)",
        [" ".join(names), id],
    )


def _fill_manifest(db: Database, id: str, read: ReadBlob) -> None:
    damaged, data = "", b""
    manifest = Manifest((), {})
    try:
        data = read(id)
        manifest = Manifest.parse(data, f"the manifest {id[:12]}")
    except DamagedError as error:
        damaged = str(error)
    facts, variant = facts_of(manifest), _text(manifest.adapter.get("variant"))
    row: dict[str, object] = {"id": id, "data": data, "size": manifest.size}
    row |= {"n_files": len(manifest.files), "damaged": damaged}
    row |= {name: getattr(facts, name) for name in ("kind", "rank", "format", "base", "revision")}
    row |= {"targets": json.dumps(facts.targets), "quantization": facts.quantization}
    db.execute("DELETE FROM search WHERE rowid = (SELECT rowid FROM manifests WHERE id = ?)", [id])
    put(db, "manifests", row)
    for file in manifest.files:
        cells = {"path": file.path, "digest": file.digest, "size": file.size, "role": file.role}
        put(db, "files", {"id": id} | cells)
    for parent in manifest.parents:
        edge = {"child": id, "parent": parent["version"].removeprefix("sha256:")}
        put(db, "edges", edge | {"relation": parent["relation"]})
    db.execute(
        "INSERT INTO search (rowid, names, targets, notes, base)"
        " SELECT rowid, '', ?, '', ? FROM manifests WHERE id = ?",
        [" ".join((facts.kind, variant, *facts.targets)), facts.base, id],
    )


def facts_of(manifest: Manifest) -> Facts:
    """The fields of `adapter`, `base` and `quantization` that the catalog lists by.

    A manifest may come from a stranger: a value of another type counts as absent.
    """
    adapter, base = manifest.adapter, manifest.base or {}
    trained_on = (manifest.quantization or {}).get("trained_on")
    quantization = trained_on.get("method") if isinstance(trained_on, dict) else None
    return Facts(
        kind=_text(adapter.get("kind")),
        rank=_integer(adapter.get("rank")),
        targets=tuple(name for name in _items(adapter.get("target_modules")) if _text(name)),
        format=_text(adapter.get("format")),
        base=_text(base.get("id")),
        revision=_text(base.get("revision")),
        quantization=_text(quantization),
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _items(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
