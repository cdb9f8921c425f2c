"""Which blobs the versions of a catalog need, and for what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime

from adapterkit.registry.blobcheck import Need
from adapterkit.registry.catalog import Catalog
from adapterkit.registry.refs import Ref

# Manifests and attachments are small, and are kept for versions that were removed too: lineage
# does not dangle, and the catalog stays a function of log and blobs.
_MANIFESTS = (
    "SELECT name, version, removed, id AS digest, NULL AS size, 'manifest' AS label FROM versions"
)
_ATTACHMENTS = (
    "SELECT v.name, v.version, v.removed, a.digest, a.size, a.kind || iif(a.name = '', '', '/')"
    " || a.name AS label FROM attachments a JOIN versions v ON v.id = a.subject"
)
_FILES = (
    "SELECT v.name, v.version, v.removed, f.digest, f.size, f.path AS label"
    " FROM files f JOIN versions v ON v.id = f.id WHERE v.removed IS NULL"
)
_SKETCHES = (
    "SELECT v.name, v.version, m.data FROM manifests m JOIN versions v ON v.id = m.id"
    " WHERE v.removed IS NULL AND instr(m.data, CAST('\"sketch\"' AS BLOB))"
)


def needs(catalog: Catalog) -> dict[str, Need]:
    """By digest."""
    found: dict[str, Need] = {}
    for query in (_MANIFESTS, _ATTACHMENTS, _FILES):
        for row in catalog.rows(query):
            need = found.setdefault(row["digest"], Need())
            need.size = row["size"] if need.size is None else need.size
            state = " (removed)" if row["removed"] else ""
            need.by.append(f"{_ref(row['name'], row['version'])}{state}: {row['label']}")
    for digest, size, by in _sketches(catalog):
        found.setdefault(digest, Need(size)).by.append(by)
    return found


def unreadable(catalog: Catalog) -> list[tuple[str, str, str]]:
    """Reference, id and what is wrong, of versions of which it is not known what they need: their
    manifest cannot be read."""
    query = (
        "SELECT v.name, v.version, v.id, m.damaged FROM manifests m JOIN versions v ON v.id = m.id"
        " WHERE v.removed IS NULL AND m.damaged != '' ORDER BY v.name, v.sort"
    )
    rows = catalog.rows(query)
    return [(_ref(row["name"], row["version"]), row["id"], row["damaged"]) for row in rows]


def _sketches(catalog: Catalog) -> Iterator[tuple[str, int, str]]:
    for row in catalog.rows(_SKETCHES):
        sketch = (json.loads(row["data"])["base"] or {}).get("sketch")
        if sketch is not None:
            by = f"{_ref(row['name'], row['version'])}: sketch of the base"
            yield sketch["digest"].removeprefix("sha256:"), sketch["size"], by


def _ref(name: str, version: str) -> str:
    return str(Ref.parse(name).at(version))


def removed_since(catalog: Catalog, moment: datetime) -> set[str]:
    """Digests of the files of versions that were removed after `moment`."""
    since = moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
    query = (
        "SELECT f.digest FROM files f JOIN versions v ON v.id = f.id WHERE v.removed > ?"
        " UNION SELECT substr(json_extract(CAST(m.data AS TEXT), '$.base.sketch.digest'), 8)"
        " FROM manifests m JOIN versions v ON v.id = m.id WHERE v.removed > ?"
        " AND json_valid(CAST(m.data AS TEXT))"
    )
    return {row["digest"] for row in catalog.rows(query, [since, since]) if row["digest"]}
