"""What the catalog holds of one manifest."""

from __future__ import annotations

import json
from typing import Any

from adapterkit.registry.errors import DamagedError
from adapterkit.registry.manifest import Manifest
from adapterkit.registry.records import Facts
from adapterkit.registry.tables import Tables


def index_manifest(tables: Tables, id: str) -> None:
    """Fill the rows of one manifest. One that cannot be read is listed as damaged: the others
    must stay within reach."""
    if tables.damage(id) != "":  # new, or worth another try
        _fill_manifest(tables, id)
    tables.reword(id)


def _fill_manifest(tables: Tables, id: str) -> None:
    damaged, data = "", b""
    manifest = Manifest((), {})
    try:
        data = tables.read(id)
        manifest = Manifest.parse(data, f"the manifest {id[:12]}")
    except DamagedError as error:
        damaged = str(error)
    facts, variant = facts_of(manifest), _text(manifest.adapter.get("variant"))
    row: dict[str, object] = {"id": id, "data": data, "size": manifest.size}
    row |= {"n_files": len(manifest.files), "damaged": damaged}
    row |= {name: getattr(facts, name) for name in ("kind", "rank", "format", "base", "revision")}
    row |= {"targets": json.dumps(facts.targets), "variant": variant}
    row["quantization"] = facts.quantization
    tables.put_manifest(row)
    for file in manifest.files:
        cells = {"path": file.path, "digest": file.digest, "size": file.size, "role": file.role}
        tables.put("files", {"id": id} | cells)
    for parent in manifest.parents:
        edge = {"child": id, "parent": parent["version"].removeprefix("sha256:")}
        tables.put("edges", edge | {"relation": parent["relation"]})


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
