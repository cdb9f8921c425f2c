"""A recipe: adapters that are one together, by the digests of their versions, with weights.

    {"schema": "adapterkit.recipe/1", "dialect": "exact", "composition": null,
     "parts": [{"version": "sha256:...", "name": "team/sql@1.0", "weight": 0.6}]}

Canonical JSON (RFC 8785): the same recipe has the same bytes. Order counts where order does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterkit.hub.findings import clean, several
from adapterkit.hub.sources import FileSource, Folder
from adapterkit.registry.errors import DamagedError, InvalidError
from adapterkit.registry.refs import Ref
from adapterkit.registry.strictjson import canonical, check_size, parse_object

SCHEMA = "adapterkit.recipe/1"
# The file of a recipe, in a folder and in a version.
FILE = "recipe.json"
KIND = "recipe"
MAX_PARTS = 256
# Of recipes in recipes.
MAX_DEPTH = 8
MAX_NAME = 200
FIELDS, PART_FIELDS = {"schema", "parts", "dialect", "composition"}, {"version", "name", "weight"}
DIALECTS = ("exact", "peft")
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Part:
    """id: of a version, 64 hex digits. name: the reference it was known by, "" if none."""

    id: str
    name: str
    weight: float = 1.0

    @property
    def label(self) -> str:
        return self.name or f"sha256:{self.id[:12]}"

    def record(self) -> dict[str, Any]:
        weight = int(self.weight) if self.weight == int(self.weight) else self.weight
        return {"version": f"sha256:{self.id}", "name": self.name, "weight": weight}


@dataclass(frozen=True)
class Recipe:
    """parts: in order. dialect: that of `attach`. composition: blocks over numbers of parts, as
    `compose.blocks` reads them; None for the sum of all."""

    parts: tuple[Part, ...]
    dialect: str = "exact"
    composition: Mapping[str, Any] | None = None

    def dump(self) -> bytes:
        return canonical(self.record())

    def record(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "parts": [part.record() for part in self.parts],
            "dialect": self.dialect,
            "composition": self.composition,
        }

    @classmethod
    def parse(cls, data: bytes, name: str) -> Recipe:
        """Raises DamagedError that lists everything wrong with it; `name` is its subject."""
        value = parse_object(data, name)
        faults = list(_faults(value))
        if faults:
            raise DamagedError(f"{name} is not a recipe: {several(faults)}")
        parts = [
            Part(row["version"].removeprefix("sha256:"), row["name"], float(row["weight"]))
            for row in value["parts"]
        ]
        return cls(tuple(parts), value.get("dialect", "exact"), value.get("composition"))


def _faults(value: Mapping[str, Any]) -> list[str]:
    if value.get("schema") != SCHEMA:
        return [f"its schema is {clean(repr(value.get('schema')), 80)}, expected {SCHEMA!r}"]
    found = [f"{clean(name)} is no field of it" for name in sorted(value.keys() - FIELDS)]
    if value.get("dialect", "exact") not in DIALECTS:
        shown = clean(repr(value["dialect"]), 80)
        found.append(f"dialect is {shown}, expected one of {', '.join(DIALECTS)}")
    if not isinstance(value.get("composition"), dict | None):
        found.append("composition is neither an object nor null")
    parts = value.get("parts")
    if not isinstance(parts, list) or not 0 < len(parts) <= MAX_PARTS:
        shown = f"a list of {len(parts)}" if isinstance(parts, list) else clean(repr(parts), 80)
        return [*found, f"parts is {shown}, expected a list of 1 to {MAX_PARTS}"]
    return found + [fault for i, row in enumerate(parts) for fault in _part_faults(i, row)]


def _part_faults(index: int, row: object) -> list[str]:
    where = f"parts[{index}]"
    if not isinstance(row, dict) or row.keys() != PART_FIELDS:
        return [f"{where} is not an object of {', '.join(sorted(PART_FIELDS))}"]
    found = []
    version, name, weight = row["version"], row["name"], row["weight"]
    if not isinstance(version, str) or not DIGEST.fullmatch(version):
        shown = clean(repr(version), 80)
        found.append(f"{where} has the version {shown}, expected sha256: and 64 hex digits")
    if not isinstance(name, str) or len(name) > MAX_NAME or not is_ref(name):
        found.append(f"{where} has the name {clean(repr(name), 80)}, expected a reference")
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or abs(weight) > 1e9:
        found.append(f"{where} has the weight {clean(repr(weight), 80)}, expected a finite number")
    return found


def is_ref(name: str) -> bool:
    if not name:
        return True
    try:
        Ref.parse(name)
    except InvalidError:
        return False
    return True


def is_recipe(folder: Folder) -> bool:
    """Whether a folder or a version is one: it has that file alone beside its papers."""
    return FILE in folder.files and not any(
        path.endswith((".safetensors", ".bin", ".pt", "adapter_config.json"))
        for path in folder.files
    )


def read_recipe(folder: Folder) -> Recipe:
    source = folder.file(FILE)
    alone = folder.name.endswith(".json")  # see folder_of
    name = clean(folder.name) if alone else f"{clean(folder.name)}/{FILE}"
    check_size(source.size, name)
    return Recipe.parse(source.read(0, source.size), name)


def is_file(path: Path) -> bool:
    """Whether a path is the file of a recipe, not a folder."""
    try:
        return path.suffix == ".json" and path.is_file()
    except (OSError, ValueError):  # a name no file system takes
        return False


def folder_of(path: Path) -> Folder:
    """A recipe that is a file of its own, whatever its name."""
    return Folder(str(path), {FILE: FileSource.open(path, FILE)})
