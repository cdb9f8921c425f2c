"""Adapters lowered over a checkpoint, module by module as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Base, Module
from adapterkit.hub.bases.spelling import Slot, Spelling, spelled
from adapterkit.hub.change import reason
from adapterkit.hub.compose import experts
from adapterkit.hub.compose.plan import Weighted
from adapterkit.hub.findings import clean
from adapterkit.hub.kinds import kind
from adapterkit.hub.kinds.base import Whole
from adapterkit.hub.offline import Ground, StoredSite, not_weights, targeted_at
from adapterkit.hub.primitives import Additive, Gain, InputRotation, Primitive
from adapterkit.hub.quant.stored import Weights, read_stored
from adapterkit.hub.tensors import read_finite
from adapterkit.registry.errors import InvalidError

Tensors = Mapping[tuple[str, str], Tensor]


@dataclass(frozen=True)
class MergeSite(StoredSite):
    """Here whatever shares the module's weight is changed with it."""

    def tied(self, *roles: str) -> tuple[str, ...]:
        held = {module for module, role in self.ground.adapter.tensors if role in roles}
        base = self.ground.base
        sharers = () if base is None else base.modules.values()
        mine = [m.name for m in sharers if m.tied_to == self.module.name]
        return tuple(name for name in mine if name not in held)


@dataclass(frozen=True, eq=False)
class Input:
    """One adapter that is merged. tensors: float32, without copies of what the base has."""

    name: str
    weight: float
    ground: Ground
    spelling: Spelling
    tensors: Tensors

    @classmethod
    def of(cls, name: str, weight: float, adapter: Adapter, weights: Weights, base: Base) -> Input:
        """adapter: in the names of the base. Raises InvalidError for one that acts elsewhere than
        in weights."""
        spelling = spelled(base, adapter.modules)
        if isinstance(kind(adapter.kind), Whole):
            places = {place for place, _ in adapter.tensors} - spelling.base.modules.keys()
            if places:
                raise not_weights(adapter, min(places))
        own = weights.over(spelling.base) if spelling.base is not base else weights
        ground = Ground(adapter, spelling.base, own)
        found = {
            place: tensor
            for place, tensor in read_finite(adapter).items()
            if not place[1].startswith("wrapper.") and not _is_copy(base, place, tensor)
        }
        return cls(name, weight, ground, spelling, found)

    @cached_property
    def sources(self) -> dict[str, list[str]]:
        """Row of the base -> modules of the adapter that may act on it."""
        found: dict[str, list[str]] = {}
        for name in dict.fromkeys(module for module, _ in self.tensors if module):
            row = self.spelling.slot(name).module
            rows = [row, *(m.name for m in self._rows.values() if m.tied_to == name)]
            for each in rows:
                found.setdefault(each, []).append(name)
        return found

    @property
    def _rows(self) -> Mapping[str, Module]:
        return self.spelling.base.modules

    def primitives(self, row: Module) -> list[Primitive]:
        """All that acts on a row; of single experts, joined to that of the fused parameter."""
        made: list[Primitive] = []
        parts: list[tuple[Slot, Primitive]] = []
        for target, primitive in self._lowered(row.name):
            slot = self.spelling.slot(target)
            if slot.module != row.name:
                continue
            if slot.expert is None:
                made.append(primitive)
            else:
                parts.append((slot, primitive))
        return made + (experts.joined(row.name, row.shape, parts) if parts else [])

    def _lowered(self, row: str) -> Iterator[tuple[str, Primitive]]:
        for name in self.sources.get(row, ()):
            site = MergeSite(self.ground.module(name), self.ground)
            mine = [place for place in self.tensors if place[0] == name]
            own = {place: self.tensors[place].double() for place in mine}
            yield from targeted_at(site, own)


class Lowering:
    """What all adapters do to a row of the base; the last rows asked for are kept."""

    def __init__(self, base: Base, inputs: list[Input]) -> None:
        self._base, self.inputs = base, inputs
        self.rows = dict.fromkeys(row for each in inputs for row in each.sources)
        self._kept: dict[str, list[Weighted]] = {}

    def updates(self, row: str) -> list[Weighted]:
        if row not in self.rows:
            return []
        if row not in self._kept:
            while len(self._kept) > 1:
                del self._kept[next(iter(self._kept))]
            self._kept[row] = self._updates(self._base.modules[row])
        return self._kept[row]

    def require_mergeable(self) -> None:
        """Raises for an adapter that is of no use here before anything is written: all of its rows
        are of a kind."""
        for each in self.inputs:
            for row in list(each.sources)[:1]:
                self.updates(row)

    def _updates(self, row: Module) -> list[Weighted]:
        found = []
        for each in self.inputs:
            made = each.primitives(row)
            _require_weights(each, row, made)
            if each.weight != 1 and any(isinstance(p, InputRotation) for p in made):
                raise InvalidError(
                    f"rotations take no weight but 0 and 1: {clean(each.name)}={each.weight:g}"
                )
            found += [Weighted(each.weight, primitive) for primitive in made]
        return found


def _require_weights(one: Input, row: Module, made: list[Primitive]) -> None:
    for primitive in made:
        if not isinstance(primitive, Additive | Gain):
            raise InvalidError(
                f"{clean(one.name)}: at {clean(row.name)}, {reason(primitive)}",
                hint="attach it: adapterkit.hub.load(BASE, adapters)",
            )


def _is_copy(base: Base, place: tuple[str, str], tensor: Tensor) -> bool:
    """Whether it is a table that repeats the base's, which PEFT writes for a targeted one."""
    module, role = place
    row = base.modules.get(module)
    if role != "table" or row is None:
        return False
    owner = base.modules[row.tied_to] if row.tied_to and not row.weight else row
    if len(owner.weight) != 1:
        return False
    stored = read_stored(base.tensors, owner.weight[0])
    return stored.shape == tensor.shape and torch.equal(tensor.to(stored.dtype), stored)
