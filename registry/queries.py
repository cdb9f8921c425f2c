"""Questions to the catalog about names, versions and what they mean."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapterkit.registry.catalog import Catalog
from adapterkit.registry.errors import InvalidError, NotFoundError
from adapterkit.registry.records import Attachment, Edge, Event, Facts, Lineage, Version, Yank
from adapterkit.registry.refs import LATEST, Ref
from adapterkit.registry.versions import sort_key

VERSIONS = (
    "SELECT v.name, v.version, v.id, v.created, v.author, v.yanked, m.size, m.n_files,"
    " m.damaged, m.kind, m.rank, m.targets, m.format, m.base, m.revision, m.quantization, (SELECT"
    " group_concat(t.tag, ' ') FROM tags t WHERE t.name = v.name AND t.sort = v.sort) AS tags"
    " FROM versions v JOIN manifests m ON m.id = v.id WHERE v.removed IS NULL"
)


def current(catalog: Catalog, name: str) -> str:
    """The name that `name` has now, if it was changed."""
    row = catalog.row("SELECT target FROM redirects WHERE name = ?", [name])
    return name if row is None else str(row["target"])


def current_ref(catalog: Catalog, ref: Ref) -> Ref:
    now = current(catalog, ref.full_name)
    if now == ref.full_name:
        return ref
    named = Ref.parse(now)
    return replace(ref, namespace=named.namespace, name=named.name)


def versions(catalog: Catalog, name: str) -> list[Version]:
    return select(catalog, "AND v.name = ? ORDER BY v.sort", name)


def select(catalog: Catalog, rest: str, *values: object) -> list[Version]:
    return [version_of(row) for row in catalog.rows(f"{VERSIONS} {rest}", values)]


def version_of(row: Mapping[str, Any]) -> Version:
    names = ("kind", "rank", "format", "base", "revision", "quantization")
    facts = Facts(targets=tuple(json.loads(row["targets"])), **{name: row[name] for name in names})
    return Version(
        name=row["name"],
        version=row["version"],
        id=row["id"],
        created=row["created"],
        author=row["author"],
        tags=tuple(sorted((row["tags"] or "").split())),
        size=row["size"],
        n_files=row["n_files"],
        facts=facts,
        damaged=row["damaged"],
        yanked=row["yanked"],
    )


def every_number(catalog: Catalog, name: str) -> list[str]:
    """All version numbers ever used for `name`, removed ones too."""
    rows = catalog.rows("SELECT version FROM versions WHERE name = ?", [name])
    return [row["version"] for row in rows]


def recorded(catalog: Catalog, name: str, version: str) -> dict[str, Any] | None:
    """The row of a version, also of a removed one: version, id, removed."""
    query = "SELECT version, id, removed FROM versions WHERE name = ? AND sort = ?"
    return catalog.row(query, [name, sort_key(version)])


def with_id(catalog: Catalog, name: str, id: str) -> Version | None:
    """The highest version of `name` that is `id`."""
    found = select(catalog, "AND v.name = ? AND v.id = ? ORDER BY v.sort DESC", name, id)
    return found[0] if found else None


def resolve(catalog: Catalog, ref: Ref) -> Version:
    """Raises NotFoundError, and InvalidError when a short digest means several versions."""
    ref = current_ref(catalog, ref)
    if ref.version is not None:
        found = select(
            catalog, "AND v.name = ? AND v.sort = ?", ref.full_name, sort_key(ref.version)
        )
    elif ref.digest is not None:
        found = _by_digest(catalog, ref)
    elif ref.tag is not None and ref.tag != LATEST:
        found = tagged(catalog, ref.full_name, ref.tag)
    else:
        # Before all releases exist, the highest of what there is, as pip does it.
        order = "ORDER BY v.is_release DESC, v.sort DESC LIMIT 1"
        found = select(catalog, f"AND v.name = ? AND v.yanked IS NULL {order}", ref.full_name)
    if not found:
        raise _notselect(catalog, ref)
    return found[0]


def tagged(catalog: Catalog, name: str, tag: str) -> list[Version]:
    """The version that has the tag, if there is one."""
    query = "AND v.name = ? AND v.sort = (SELECT sort FROM tags WHERE name = v.name AND tag = ?)"
    return select(catalog, query, name, tag)


def is_protected(catalog: Catalog, name: str, tag: str) -> bool:
    query = "SELECT 1 FROM protected WHERE name = ? AND tag = ?"
    return catalog.row(query, [name, tag]) is not None


def yank(catalog: Catalog, version: Version) -> Yank | None:
    """What was last said of it since it was recorded, maybe once more after a removal."""
    row = catalog.row(
        "SELECT kind, created, payload FROM events WHERE name = ? AND kind IN ('yank', 'version')"
        " AND json_extract(payload, '$.version') = ? ORDER BY seq DESC LIMIT 1",
        [version.name, version.version],
    )
    if row is None or row["kind"] == "version":
        return None
    said = json.loads(row["payload"])
    return Yank(said["yanked"], said["reason"], said.get("since", row["created"]))


def former_names(catalog: Catalog, name: str) -> list[str]:
    """Those that lead to `name`."""
    rows = catalog.rows("SELECT name FROM redirects WHERE target = ? ORDER BY name", [name])
    return [row["name"] for row in rows]


def _by_digest(catalog: Catalog, ref: Ref) -> list[Version]:
    query = "AND v.name = ? AND v.id >= ? AND v.id < ? ORDER BY v.sort DESC"
    found = select(catalog, query, ref.full_name, ref.digest, f"{ref.digest}g")
    if len({version.id for version in found}) > 1:
        ids = ", ".join(sorted({version.id[:20] for version in found}))
        raise InvalidError(f"{ref} means several versions: {ids}", hint="give more digits")
    return found


def _notselect(catalog: Catalog, ref: Ref) -> NotFoundError:
    have = versions(catalog, ref.full_name)
    if ref.version is not None:
        row = recorded(catalog, ref.full_name, ref.version)
        if row is not None and row["removed"]:
            return NotFoundError(f"{ref} was removed on {row['removed'][:10]}")
    if have and ref.version == ref.digest is None and ref.tag in (None, LATEST):
        hint = f"name one of them: {have[-1].ref}"
        return NotFoundError(f"all versions of {ref.short_name} were yanked", hint=hint)
    if have:
        tags = sorted({tag for version in have for tag in version.tags})
        some = ", ".join([version.version for version in have[-8:]] + tags[:8])
        return NotFoundError(f"{ref} is not in the registry", hint=f"{ref.short_name} has {some}")
    return NotFoundError(f"{ref} is not in the registry", hint=_hint(catalog, ref))


def _hint(catalog: Catalog, ref: Ref) -> str | None:
    if Path(ref.full_name if ref.namespace != "local" else ref.name).exists():
        return f"there is such a folder: write ./{ref.short_name}"
    rows = catalog.rows("SELECT DISTINCT name FROM versions WHERE removed IS NULL")
    names = [Ref.parse(row["name"]).short_name for row in rows]
    near = difflib.get_close_matches(ref.short_name, names, n=3)
    return f"did you mean {', '.join(near)}" if near else None


def sizes(catalog: Catalog, wanted: Iterable[int]) -> set[int]:
    """Those of `wanted` that a file of some version has."""
    query = "SELECT DISTINCT size FROM files WHERE size IN (SELECT value FROM json_each(?))"
    return {row["size"] for row in catalog.rows(query, [json.dumps(list(wanted))])}


def attachments(catalog: Catalog, id: str) -> list[Attachment]:
    """Oldest first."""
    rows = catalog.rows(
        "SELECT subject, kind, name, digest, size, created, author FROM attachments"
        " WHERE subject = ? ORDER BY seq, kind, name",
        [id],
    )
    return [Attachment(**row) for row in rows]


def history(catalog: Catalog, name: str) -> list[Event]:
    rows = catalog.rows("SELECT * FROM events WHERE name = ? ORDER BY seq", [name])
    return [
        Event(row["seq"], row["kind"], row["created"], row["author"], json.loads(row["payload"]))
        for row in rows
    ]


def lineage(catalog: Catalog, id: str) -> Lineage:
    up = _edges(catalog, id, "child", "parent")
    down = _edges(catalog, id, "parent", "child")
    return Lineage(id, tuple(up), tuple(down))


def _edges(catalog: Catalog, id: str, near: str, far: str) -> list[Edge]:
    # UNION, not UNION ALL: a manifest that claims a loop must not make one here.
    rows = catalog.rows(
        f"WITH RECURSIVE reached (id) AS (VALUES (?) UNION SELECT {far} FROM edges"
        f" JOIN reached ON {near} = reached.id)"
        f" SELECT child, parent, relation FROM edges WHERE {near} IN reached"
        " ORDER BY child, parent, relation",
        [id],
    )
    return _refs_of(catalog, rows)


def parents(catalog: Catalog, id: str) -> list[Edge]:
    query = "SELECT child, parent, relation FROM edges WHERE child = ? ORDER BY parent, relation"
    return _refs_of(catalog, catalog.rows(query, [id]))


def _refs_of(catalog: Catalog, rows: Iterable[Mapping[str, Any]]) -> list[Edge]:
    return [
        Edge(
            row["child"], row["parent"], row["relation"],
            any_ref(catalog, row["child"]), any_ref(catalog, row["parent"]),
        )
        for row in rows
    ]  # fmt: skip


def any_ref(catalog: Catalog, id: str) -> Ref | None:
    query = (
        "SELECT name, version FROM versions WHERE id = ? AND removed IS NULL ORDER BY name, sort"
    )
    row = catalog.row(query, [id])
    return None if row is None else Ref.parse(row["name"]).at(row["version"])
