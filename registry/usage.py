"""How much room names take, and how much of it is theirs alone."""

from __future__ import annotations

import json
from dataclasses import dataclass

from adapterkit.registry import listing
from adapterkit.registry.blobs import Blobs
from adapterkit.registry.catalog import Catalog
from adapterkit.registry.files import storage_errors


@dataclass(frozen=True)
class Usage:
    """size: bytes of the files of all versions. stored: the same, equal files counted once.

    own: those of `stored` that no other name has: what goes when the name goes.
    """

    name: str
    n_versions: int
    size: int
    stored: int
    own: int


@dataclass(frozen=True)
class Disk:
    """Blobs of all kinds, also those that nothing refers to any more."""

    n_blobs: int
    size: int


_USAGE = """
WITH used AS (
    SELECT DISTINCT v.name, f.digest, f.size FROM versions v JOIN files f ON f.id = v.id
    WHERE v.removed IS NULL
), spread AS (
    SELECT digest, count(*) AS n_names FROM used GROUP BY digest
), kept AS (
    SELECT name, sum(size) AS stored, sum(iif(n_names = 1, size, 0)) AS own
    FROM used JOIN spread USING (digest) GROUP BY name
), named AS (
    SELECT name, count(*) AS n_versions, sum(m.size) AS size FROM versions v
    JOIN manifests m ON m.id = v.id WHERE v.removed IS NULL GROUP BY name
)
SELECT name, n_versions, size, coalesce(stored, 0) AS stored, coalesce(own, 0) AS own
FROM named LEFT JOIN kept USING (name)
"""


def per_name(catalog: Catalog, pattern: str | None) -> list[Usage]:
    values = [json.dumps(listing.names(catalog, pattern))]
    query = f"{_USAGE} WHERE name IN (SELECT value FROM json_each(?)) ORDER BY name"
    return [Usage(**row) for row in catalog.rows(query, values)]


def on_disk(blobs: Blobs) -> Disk:
    files, sizes = blobs.files, []
    if not blobs.root.exists():
        return Disk(0, 0)
    with storage_errors(f"{blobs.root}"):
        for name in files.listdir(blobs.root):
            folder = blobs.root / name
            sizes += [files.lstat(folder / blob).st_size for blob in files.listdir(folder)]
    return Disk(len(sizes), sum(sizes))
