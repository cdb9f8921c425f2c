"""How an adapter was made, beside its files in a folder: `add` brings it into the manifest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterkit.hub.findings import WARNING, Finding, clean
from adapterkit.hub.sources import ByteSource, Folder, read_object
from adapterkit.registry.errors import DamagedError
from adapterkit.registry.strictjson import canonical, digest_of
from adapterkit.registry.wholes import PART

FILE = "adapterkit.json"
SCHEMA = "adapterkit.made/1"
FIELDS = {"schema", "files", "parents", "recipe"}
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
MAX_PARENTS = 1000
CHUNK = 1 << 20


@dataclass(frozen=True)
class Papers:
    """parents, recipe: as in a manifest."""

    parents: tuple[Mapping[str, Any], ...] = ()
    recipe: Mapping[str, Any] | None = None
    findings: tuple[Finding, ...] = field(default=())


def dump(
    files: Mapping[str, bytes], parents: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]
) -> bytes:
    digests = {path: f"sha256:{digest_of(data)}" for path, data in files.items()}
    whole = {"schema": SCHEMA, "files": digests, "parents": list(parents), "recipe": dict(recipe)}
    return canonical(whole)


def read(folder: Folder) -> Papers:
    """What a folder says of itself; nothing, with a warning, if its files were changed since.

    Raises DamagedError if it is malformed."""
    if FILE not in folder.files:
        return Papers()
    name = f"{clean(folder.name)}/{FILE}"
    value = read_object(folder.files[FILE], name)
    if value.keys() != FIELDS or value["schema"] != SCHEMA or not _is_sound(value):
        raise DamagedError(f"{name} does not say how an adapter was made, as {SCHEMA} would")
    for path, digest in value["files"].items():
        source = folder.files.get(path)
        if source is None or f"sha256:{sha256_of(source)}" != digest:
            about = f"{clean(path)} is another one: what {FILE} says of it does not count"
            found = Finding(WARNING, "changed-since", FILE, "the files that were made", about)
            return Papers(findings=(found,))
    return Papers(tuple(value["parents"]), value["recipe"])


def _is_sound(value: Mapping[str, Any]) -> bool:
    parents = value["parents"]
    return (
        isinstance(value["files"], dict)
        and bool(value["files"])
        and isinstance(value["recipe"], dict)
        and isinstance(parents, list)
        and len(parents) <= MAX_PARENTS
        and all(map(_is_parent, parents))
    )


def _is_parent(row: object) -> bool:
    return (
        isinstance(row, dict)
        and row.keys() == {"version", "relation"}
        and isinstance(row["version"], str)
        and DIGEST.fullmatch(row["version"]) is not None
        and isinstance(row["relation"], str)
        and row["relation"] != PART
    )


def sha256_of(source: ByteSource) -> str:
    found = hashlib.sha256()
    for start in range(0, source.size, CHUNK):
        found.update(source.read(start, min(CHUNK, source.size - start)))
    return found.hexdigest()
