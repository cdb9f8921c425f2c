"""A base under the names that an adapter uses: those of another version of transformers.

Before transformers 5 every expert was a module of its own; before 4.52 the language model of a
vision model stood at the root.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from adapterkit.hub.bases.base import EXPERTS, LINEAR, Base, Module
from adapterkit.hub.bases.families import FAMILIES, Family
from adapterkit.hub.bases.names import Names
from adapterkit.registry.errors import MismatchError


@dataclass(frozen=True)
class Slot:
    """Where a module of another name lies. module: its row at run time; expert, start, stop: the
    rows of one expert that it is, of a fused parameter; None for all of it."""

    module: str
    expert: int | None = None
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Spelling:
    """base: its modules under the adapter's names. slots: of those whose names are not its own."""

    base: Base
    slots: Mapping[str, Slot] = field(default_factory=dict)

    def slot(self, name: str) -> Slot:
        return self.slots.get(name) or Slot(name)


def spelled(base: Base, modules: Collection[str]) -> Spelling:
    """The base in the spelling that knows most of these modules; its own if none knows more."""
    named = {name for name in modules if name}
    wanted, mine = named - base.modules.keys(), named & base.modules.keys()
    family = FAMILIES.get(base.model_type)
    best, known = Spelling(base), 0
    if not wanted or family is None:
        return best
    for spelling in (*_spellings(base, family), *_stored(base, family, wanted)):
        # what the base's own names have and this one lacks counts against it
        count = len(wanted & spelling.base.modules.keys())
        count -= len(mine - spelling.base.modules.keys())
        if count > known:
            best, known = spelling, count
    return best


def _spellings(base: Base, family: Family) -> Iterator[Spelling]:
    parts = dict(_parts(base, family))
    slots = {row.name: slot for row, slot in parts.values()}
    whole = {**base.modules, **{name: row for name, (row, _) in parts.items()}}
    if parts:
        yield Spelling(replace(base, modules=whole), slots)
    if family.older:
        names = {name: _older(name, family) for name in whole}
        renamed = {
            names[name]: replace(row, name=names[name], tied_to=row.tied_to and names[row.tied_to])
            for name, row in whole.items()
        }
        places = {names[n]: slots.get(n, Slot(n)) for n in whole if names[n] != n or n in slots}
        yield Spelling(replace(base, modules=renamed), places)


def _parts(base: Base, family: Family) -> Iterator[tuple[str, tuple[Module, Slot]]]:
    """Every expert's own matrices, as transformers 4 named them."""
    for fuse in family.experts:
        for fused in base.modules.values():
            stem, _, parameter = fused.name.rpartition(".")
            if fused.type != EXPERTS or parameter != fuse.target:
                continue
            count, rows, width = fused.shape
            size = rows // len(fuse.order)
            for expert in range(count):
                for place, part in enumerate(fuse.order):
                    slot = Slot(fused.name, expert, place * size, (place + 1) * size)
                    weight = fused.weight[expert * len(fuse.order) + place :][:1]
                    name = f"{stem}.{expert}.{part}"
                    yield name, (Module(name, LINEAR, (size, width), weight), slot)


def _older(name: str, family: Family) -> str:
    for pattern, replacement in family.older:
        name = re.sub(pattern, replacement, name, count=1)
    return name


def _stored(base: Base, family: Family, wanted: Collection[str]) -> Iterator[Spelling]:
    """A vision model's modules as its checkpoints are named, where the adapter names them so."""
    if not family.embedding.startswith("language_model."):
        return
    try:
        names = Names.of(base.config, base.architecture or None)
    except MismatchError:  # a class of its own, whose names nobody knows
        return
    found = {}
    for name in wanted:
        row = (names.runtime(f"{name}.weight") or "").rpartition(".")[0]
        if row in base.modules:
            found[row] = name
    renamed = {
        found.get(name, name): replace(row, name=found.get(name, name), tied_to=_as(row, found))
        for name, row in base.modules.items()
    }
    yield Spelling(replace(base, modules=renamed), {new: Slot(row) for row, new in found.items()})


def _as(row: Module, names: Mapping[str, str]) -> str | None:
    return names.get(row.tied_to, row.tied_to) if row.tied_to else None
