"""Versions that are made of others which stay needed: recipes, and the parts of them."""

from __future__ import annotations

from adapterkit.registry import queries
from adapterkit.registry.change import Change
from adapterkit.registry.errors import ConflictError, NotFoundError
from adapterkit.registry.manifest import Manifest
from adapterkit.registry.records import Version

# Of an edge from a version to one without which it cannot be loaded.
PART = "part"


def parts_of(manifest: Manifest) -> list[str]:
    """Ids of the versions it cannot be loaded without, in order, each once."""
    ids = [row["version"] for row in manifest.parents if row["relation"] == PART]
    return list(dict.fromkeys(id.removeprefix("sha256:") for id in ids))


def require_parts(change: Change, manifest: Manifest) -> None:
    """Raises NotFoundError naming every part that is not here: what is stored can be loaded."""
    absent = [id for id in parts_of(manifest) if queries.any_ref(change.catalog, id) is None]
    if absent:
        shown = ", ".join(f"sha256:{id[:12]}" for id in absent[:20])
        raise NotFoundError(f"its parts are not in the registry: {shown}")


def require_unneeded(change: Change, target: Version) -> None:
    """Raises ConflictError if another version is made of this one, and it is here once only."""
    query = (
        "SELECT w.name, w.version FROM edges e JOIN versions w ON w.id = e.child"
        " WHERE e.parent = ? AND e.relation = ? AND w.removed IS NULL ORDER BY w.name, w.sort"
    )
    wholes = change.catalog.rows(query, [target.id, PART])
    copies = "SELECT count(*) AS n FROM versions WHERE id = ? AND removed IS NULL"
    row = change.catalog.row(copies, [target.id])
    if wholes and row is not None and row["n"] == 1:
        first = wholes[0]
        ref = f"{queries.current(change.catalog, first['name']).removeprefix('local/')}"
        named = f"{ref}@{first['version']}"
        more = f" and of {len(wholes) - 1} more" if len(wholes) > 1 else ""
        raise ConflictError(
            f"{target.ref} is a part of {named}{more}", hint=f"adapter rm {named} first"
        )
