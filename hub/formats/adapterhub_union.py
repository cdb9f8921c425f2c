"""AdapterHub's `union`: several methods in one adapter, as in MAM and UniPELT.  adapters 1.3
`configuration/adapter_config.py` (ConfigUnion)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from adapterkit.hub.bases.places import ATTENTION, CROSS, OUTPUT
from adapterkit.hub.fields import UnionFields, UnionPart
from adapterkit.hub.findings import Finding
from adapterkit.hub.formats.adapterhub_type import (
    ARCHITECTURES,
    BOTTLENECK,
    Architecture,
    Key,
    Outer,
    Paths,
    Place,
    architecture,
)
from adapterkit.hub.formats.config import ConfigReader, unsupported

# More than any two of one kind can be of.
MAX_PARTS = 16
NAME = "union"
# Which flag of a bottleneck puts it where: two of them may share an adapter.
FLAGS = {ATTENTION: "mh_adapter", CROSS: "mh_adapter", OUTPUT: "output_adapter"}
Config = Mapping[str, Any]


def parts(config: Config) -> list[tuple[Config, Architecture]]:
    """The configs of those that are read, with their rows; `refusals` says which are not."""
    return [(part, architecture(_name(part)).placed(part)) for part in _configs(config)]


def _configs(config: Config) -> list[Config]:
    listed = config.get("configs")
    if not isinstance(listed, list) or len(listed) > MAX_PARTS:
        return []
    return [part for part in listed if isinstance(part, dict) and _name(part) in ARCHITECTURES]


def _name(part: Config) -> str:
    value = part.get("architecture")
    found = BOTTLENECK if value is None else value
    return found if isinstance(found, str) and found != NAME else ""


def placing(config: Config) -> Callable[[Key], Place | None]:
    """The role of a tensor has the number of its part in front."""
    rows = parts(config)

    def place(key: Key) -> Place | None:
        for number, (part, row) in enumerate(rows):
            found = row.place(key)
            if found is not None and _is_of(part, found):
                return found[0], f"{number}.{found[1]}"
        return None

    return place


def _is_of(part: Config, place: Place) -> bool:
    flag = FLAGS.get(place[0].rpartition(".")[2])
    return _name(part) != BOTTLENECK or flag is None or bool(part.get(flag))


def read(reader: ConfigReader, outer: Outer, paths: Paths) -> UnionFields:
    listed = reader.config.get("configs")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_PARTS:
        reader.fault("configs", f"a list of 1 to {MAX_PARTS} configs")
    made = []
    for number, (part, row) in enumerate(parts(reader.config)):
        inner = ConfigReader(part, f"{reader.name}: configs[{number}]")
        targets = row.targets(inner, outer, paths)
        fields = row.fields(inner, outer, paths)
        inner.done()
        made.append(UnionPart(row.kind_of(part, outer), fields, targets))
    return UnionFields(tuple(made))


def refusals(config: Config, outer: Outer) -> list[Finding]:
    listed = config.get("configs")
    return [
        unsupported("configs", f"{part!r} among them, of which nothing here")
        for part in (listed if isinstance(listed, list) else [])
        if not isinstance(part, dict) or _name(part) not in ARCHITECTURES
    ]


def _none(key: Key) -> Place | None:
    return None


def repeating(config: Config) -> frozenset[str]:
    rows = enumerate(parts(config))
    return frozenset(f"{number}.{role}" for number, (_, row) in rows for role in row.repeated)


UNION = Architecture(
    kind="union",
    place=_none,
    placing=placing,
    repeating=repeating,
    parts=parts,
    fields=read,
    known=frozenset(["configs"]),
    refusals=refusals,
)
