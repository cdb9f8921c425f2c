"""What the catalog holds of one manifest: the fields to list by, and the words to search."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.registry.errors import DamagedError
from adapterkit.registry.manifest import Manifest
from adapterkit.registry.records import Facts

if TYPE_CHECKING:
    from sqlite_utils import Database

ReadBlob = Callable[[str], bytes]

# A longer card is searched by nobody, and need not be held twice.
MAX_CARD = 1 << 18


def put(db: Database, table: str, row: Mapping[str, object]) -> None:
    """Insert or replace; sqlite-utils' own insert would commit the transaction (before 4.0)."""
    columns = ", ".join(row)
    values = ", ".join("?" * len(row))
    db.execute(f"INSERT OR REPLACE INTO {table} ({columns}) VALUES ({values})", list(row.values()))


def index_manifest(db: Database, id: str, read: ReadBlob) -> None:
    """Fill the rows of one manifest. One that cannot be read is listed as damaged: the others
    must stay within reach."""
    known = next(db.query("SELECT damaged FROM manifests WHERE id = ?", [id]), None)
    if known is None or known["damaged"]:
        _fill_manifest(db, id, read)
    else:
        index_names(db, id)


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
    row |= {"targets": json.dumps(facts.targets), "variant": variant}
    row["quantization"] = facts.quantization
    db.execute("DELETE FROM search WHERE rowid = (SELECT rowid FROM manifests WHERE id = ?)", [id])
    put(db, "manifests", row)
    for file in manifest.files:
        cells = {"path": file.path, "digest": file.digest, "size": file.size, "role": file.role}
        put(db, "files", {"id": id} | cells)
    for parent in manifest.parents:
        edge = {"child": id, "parent": parent["version"].removeprefix("sha256:")}
        put(db, "edges", edge | {"relation": parent["relation"]})
    words = " ".join((facts.kind, variant, *facts.targets))
    db.execute(
        "INSERT INTO search (rowid, names, targets, notes, base, card)"
        " SELECT rowid, ?, ?, '', ?, ? FROM manifests WHERE id = ?",
        [_names(db, id), words, facts.base, _card(manifest, read), id],
    )


def _card(manifest: Manifest, read: ReadBlob) -> str:
    """What the model card says; nothing where it is lost, which whoever reads it reports."""
    found = (f for f in manifest.files if f.role == "card" and f.size <= MAX_CARD)
    card = next(found, None)
    if card is None:
        return ""
    try:
        return read(card.digest).decode(errors="replace")
    except DamagedError:
        return ""


def index_names(db: Database, id: str) -> None:
    """Make a manifest be found by the names it has now."""
    db.execute(
        "UPDATE search SET names = ? WHERE rowid = (SELECT rowid FROM manifests WHERE id = ?)",
        [_names(db, id), id],
    )


def _names(db: Database, id: str) -> str:
    rows = db.query("SELECT DISTINCT name FROM versions WHERE id = ? ORDER BY name", [id])
    return " ".join(row["name"] for row in rows)


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
