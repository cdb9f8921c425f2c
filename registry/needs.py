"""Which blobs the versions of a catalog need, and for what."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

from adapterkit.registry.catalog import Catalog
from adapterkit.registry.refs import Ref

# Manifests and attachments are small, and are kept for versions that were removed too: lineage
# does not dangle, and the catalog stays a function of log and blobs.
_SIZES = (
    "SELECT DISTINCT id, NULL FROM versions",
    "SELECT DISTINCT digest, size FROM attachments",
    "SELECT DISTINCT digest, size FROM files f"
    " WHERE EXISTS (SELECT 1 FROM versions v WHERE v.id = f.id AND v.removed IS NULL)",
)
_USES = (
    "SELECT name, version, removed, 'manifest' FROM versions WHERE id = ?",
    "SELECT v.name, v.version, v.removed, a.kind || iif(a.name = '', '', '/') || a.name"
    " FROM attachments a JOIN versions v ON v.id = a.subject WHERE a.digest = ?",
    "SELECT v.name, v.version, v.removed, f.path"
    " FROM files f JOIN versions v ON v.id = f.id WHERE v.removed IS NULL AND f.digest = ?",
)
_SKETCHES = (
    "SELECT substr(json_extract(data, '$.base.sketch.digest'), 8),"
    " json_extract(data, '$.base.sketch.size'), v.name, v.version FROM"
    " (SELECT id, CAST(data AS TEXT) AS data FROM manifests WHERE damaged = '') m"
    " JOIN versions v ON v.id = m.id WHERE v.removed IS NULL AND instr(m.data, '\"sketch\"')"
)
_OF_VERSION = (
    "SELECT id FROM versions WHERE name = :name AND version = :version",
    "SELECT a.digest FROM attachments a JOIN versions v ON v.id = a.subject"
    " WHERE v.name = :name AND v.version = :version",
    "SELECT f.digest FROM files f JOIN versions v ON v.id = f.id"
    " WHERE v.name = :name AND v.version = :version",
)


class Needs:
    """sizes: of every blob that is needed, by its digest; None where the log says none. There are
    many: whose a blob is is asked when it is wanted, while the catalog is open."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.sizes: dict[str, int | None] = {}
        for query in _SIZES:
            for digest, size in catalog.db.execute(query):
                if self.sizes.get(digest) is None:
                    self.sizes[digest] = size
        for digest, size, *_ in self._sketched():
            self.sizes.setdefault(digest, size)

    def by(self, digest: str) -> tuple[str, ...]:
        """`NAME@VERSION: what it is there`, of all that need it."""
        found = []
        for query in _USES:
            for name, version, removed, label in self.catalog.db.execute(query, [digest]):
                state = " (removed)" if removed else ""
                found.append(f"{_ref(name, version)}{state}: {label}")
        refs = [_ref(*version) for version in self._sketches.get(digest, [])]
        return (*found, *(f"{ref}: sketch of the base" for ref in refs))

    def of(self, ref: Ref) -> NeedsOfOne:
        key = {"name": ref.full_name, "version": ref.version}
        rows = [row for query in _OF_VERSION for row in self.catalog.db.execute(query, key)]
        found = {digest for (digest,) in rows}
        found |= {d for d, _, *of in self._sketched() if tuple(of) == tuple(key.values())}
        sizes = {digest: self.sizes[digest] for digest in sorted(found & self.sizes.keys())}
        return NeedsOfOne(sizes, {digest: self.by(digest) for digest in sizes})

    def _sketched(self) -> Iterator[tuple[str, int, str, str]]:
        rows = self.catalog.db.execute(_SKETCHES)
        return ((digest, *rest) for digest, *rest in rows if digest)

    @cached_property
    def _sketches(self) -> dict[str, list[tuple[str, str]]]:
        found: dict[str, list[tuple[str, str]]] = {}
        for digest, _, *version in self._sketched():
            found.setdefault(digest, []).append((version[0], version[1]))
        return found


@dataclass(frozen=True)
class NeedsOfOne:
    """Those of one version, as Needs has them; the catalog may be closed."""

    sizes: Mapping[str, int | None]
    uses: Mapping[str, tuple[str, ...]]

    def by(self, digest: str) -> tuple[str, ...]:
        return self.uses[digest]


def unreadable(catalog: Catalog) -> list[tuple[str, str, str]]:
    """Reference, id and what is wrong, of versions of which it is not known what they need: their
    manifest cannot be read."""
    query = (
        "SELECT v.name, v.version, v.id, m.damaged FROM manifests m JOIN versions v ON v.id = m.id"
        " WHERE v.removed IS NULL AND m.damaged != '' ORDER BY v.name, v.sort"
    )
    rows = catalog.rows(query)
    return [(_ref(row["name"], row["version"]), row["id"], row["damaged"]) for row in rows]


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
