"""From an adapter to primitives bound to the modules of a live model; nothing is dropped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Base, Module
from adapterkit.hub.bases.spelling import Slot, spelled
from adapterkit.hub.compose import experts
from adapterkit.hub.compose.bank import Banked
from adapterkit.hub.compose.model import weights_of
from adapterkit.hub.compose.offload import fetched
from adapterkit.hub.compose.origin import Origin
from adapterkit.hub.compose.placing import settle
from adapterkit.hub.compose.repeated import require_same
from adapterkit.hub.compose.spots import Spot, Spots
from adapterkit.hub.findings import clean
from adapterkit.hub.frozen import ROLE
from adapterkit.hub.kinds import kind, schema_of
from adapterkit.hub.kinds.base import Used, Whole
from adapterkit.hub.primitives import DenseDelta, InputRotation, Layer, LowRank, Primitive
from adapterkit.hub.rooting import rooted
from adapterkit.hub.tensors import is_finite, read_finite
from adapterkit.registry.errors import MismatchError


@dataclass(frozen=True)
class Bound:
    """One tensor of the file and what became of it. primitive: "LowRank", "Replace", ...;
    "copy" for one that equals what the base or the file has already, "unused" for the module as it
    was before training, which PEFT writes beside the trained one."""

    tensor: str
    module: str
    role: str
    primitive: str


@dataclass(frozen=True)
class Lowered:
    """updates: module path -> primitives, in order; "" is the model itself. bound: one entry for
    each tensor."""

    updates: Mapping[str, tuple[Primitive, ...]]
    bound: tuple[Bound, ...]

    @cached_property
    def classes(self) -> tuple[type[Primitive], ...]:
        """Of its primitives."""
        return tuple({type(each) for made in self.updates.values() for each in made})

    def holds(self, *classes: type[Primitive]) -> bool:
        return any(issubclass(held, classes) for held in self.classes)

    @cached_property
    def size(self) -> int:
        """Bytes that its primitives hold, whatever they share counted once."""
        every = [primitive for made in self.updates.values() for primitive in made]
        banked = [t for p in every if isinstance(p, Banked) for t in _tensors(p)]
        held = (t for p in every if not isinstance(p, Banked) for t in _tensors(p))
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        return sum(storages.values()) + sum(t.nbytes for t in banked)


@dataclass(frozen=True)
class LiveSite:
    """A module of the live model, as a kind sees it."""

    module: Module
    base: Base
    adapter: Adapter
    spot: Spot
    origin: Origin
    all_modules: Shared

    @property
    def shared(self) -> Mapping[str, Tensor]:
        """What belongs to all modules, as this one computes."""
        return self.all_modules.on(self.spot)

    def tied(self, *roles: str) -> tuple[str, ...]:
        held = {module for module, role in self.adapter.tensors if role in roles}
        sharers = self.base.modules.values()
        mine = [m.name for m in sharers if m.tied_to == self.module.name]
        return tuple(name for name in mine if name not in held)

    def bias(self) -> Tensor | None:
        bias = getattr(self.spot.module, "bias", None)
        return bias.detach().float() if isinstance(bias, Tensor) else None

    def weight(self) -> Tensor:
        """From memory, else from the files the model came from.

        Raises MismatchError naming the module if its exact weight is in neither.
        """
        try:
            return self.spot.weight()
        except MismatchError as error:
            dense = self.origin.weight(self.spot.slot.module)
            if dense is None:
                raise MismatchError(f"{self.module.name}: {error}", hint=error.hint) from error
            from adapterkit.hub.quant import bnb4  # the only format that loses its weight

            return bnb4.requantized(self.spot.module, dense)


class Shared:
    """The adapter's tensors for all modules: once for each device and dtype, whoever uses them."""

    def __init__(
        self,
        adapter: Adapter,
        base: Base,
        tensors: Mapping[tuple[str, str], Tensor],
        dtype: torch.dtype | None,
    ) -> None:
        self._adapter, self._base, self._dtype = adapter, base, dtype
        self._own = {role: tensor for (path, role), tensor in tensors.items() if not path}
        self._placed: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        """Those that the file leaves out are made."""
        return {**schema_of(self._adapter, self._base).shared(), **self._own}

    def on(self, spot: Spot) -> dict[str, Tensor]:
        """As the module computes: its device, its dtype."""
        place = spot.device, self._dtype or spot.dtype
        if place not in self._placed:
            made = {role: tensor.to(*place) for role, tensor in self._tensors.items()}
            if not all(map(is_finite, made.values())):
                # float32 where half precision would overflow, as for factors of one module
                made = {role: tensor.to(place[0]) for role, tensor in self._tensors.items()}
            self._placed[place] = made
        return self._placed[place]


def lower(
    adapter: Adapter, base: Base, modules: Mapping[str, nn.Module], dtype: torch.dtype | None
) -> Lowered:
    """Every tensor of the adapter as primitives on `modules`, on each module's device.

    dtype: of the factors; None is each module's own compute dtype. Raises DamagedError naming
    every tensor that is not finite, and MismatchError if a tensor would be left out.
    """
    adapter, made = rooted(adapter, base), kind(adapter.kind)
    tensors = read_finite(adapter)
    whole: dict[tuple[str, str], Tensor] = {}
    if isinstance(made, Whole):
        whole = {place: t for place, t in tensors.items() if place[0] not in base.modules}
    own = {place: tensor for place, tensor in tensors.items() if place not in whole}
    spelling = spelled(base, adapter.modules)
    spots = Spots(modules, spelling)
    found = list(_by_module(adapter, spots, own, dtype))
    if isinstance(made, Whole) and whole:
        found.append(_whole(adapter, made, base, whole))
    updates: dict[str, list[Primitive]] = {}
    parts: dict[str, list[tuple[Slot, Primitive]]] = {}
    for target, primitive in (made for primitives, _ in found for made in primitives):
        slot = spots[target].slot
        if slot.expert is None:
            updates.setdefault(slot.module, []).append(_placed(primitive, spots[target], dtype))
        else:
            parts.setdefault(slot.module, []).append((slot, primitive))
    for row, single in parts.items():
        fused = experts.joined(row, base.modules[row].shape, single)
        updates[row] = [_placed(each, spots[row], dtype) for each in fused]
    bound = [row for _, rows in found for row in rows]
    if not isinstance(made, Whole):
        bound += [Bound(item.key, "", role, "LowRank") for role, item in adapter.shared.items()]
    return Lowered({name: tuple(each) for name, each in updates.items()}, tuple(bound))


Made = tuple[list[tuple[str, Primitive]], list[Bound]]


def _by_module(
    adapter: Adapter,
    spots: Spots,
    tensors: Mapping[tuple[str, str], Tensor],
    dtype: torch.dtype | None,
) -> Iterator[Made]:
    """Primitives and report of each module of the base that the file has tensors for."""
    base = spots.spelling.base
    origin = Origin(base.name)
    shared = Shared(adapter, base, tensors, dtype)
    for name, stored in adapter.modules.items():
        if name not in base.modules:
            continue
        spot = spots[name]
        site = LiveSite(base.modules[name], base, adapter, spot, origin, shared)
        with fetched(spot.module):
            given = {role: tensors[name, role].to(spot.device) for role in stored}
            require_same(adapter, name, given, spot.module)
            roles, copies = _without_copies(given, spot.module)
            used = Used(roles)
            made = list(kind(adapter.kind).lower(adapter.fields, site, used))
        _require_all(adapter, (stored[role].key for role in roles if role not in used.taken))
        names = "+".join(dict.fromkeys(type(primitive).__name__ for _, primitive in made))
        yield made, [
            Bound(item.key, name, role, _fate(role, copies, names)) for role, item in stored.items()
        ]


def _whole(
    adapter: Adapter, made: Whole, base: Base, tensors: Mapping[tuple[str, str], Tensor]
) -> Made:
    """The same for what belongs to places of layers and to the model as a whole."""
    used = Used(tensors)
    primitives = list(made.lower_whole(adapter.fields, base, used))
    _require_all(adapter, (adapter.tensors[place].key for place in used if place not in used.taken))
    names = "+".join(dict.fromkeys(type(primitive).__name__ for _, primitive in primitives))
    bound = [Bound(adapter.tensors[place].key, *place, names) for place in tensors]
    return primitives, bound


def _require_all(adapter: Adapter, left: Iterable[str]) -> None:
    if shown := ", ".join(map(clean, left)):
        raise MismatchError(f"{adapter.name}: nothing applies {shown}")


def _fate(role: str, copies: set[str], primitives: str) -> str:
    if role.startswith("wrapper.original_module"):
        return "unused"
    return "copy" if role in copies else primitives


def _tensors(primitive: Primitive) -> list[Tensor]:
    held = (getattr(primitive, field.name) for field in fields(primitive))
    flat = (one for value in held for one in (value if isinstance(value, tuple) else (value,)))
    return [value for value in flat if isinstance(value, Tensor)]


def _without_copies(
    tensors: Mapping[str, Tensor], live: nn.Module
) -> tuple[dict[str, Tensor], set[str]]:
    """The tensors left when those that only repeat what the base has are taken out."""
    copies = {role for role in tensors if role.startswith("wrapper.")}
    table, weight = tensors.get("table"), weights_of(live)
    if table is not None and weight is not None and table.shape == weight.shape:
        equal = torch.equal(table.to(weight.dtype), weight.detach())
        copies |= {"table"} if equal else set()
    copies |= {role for role in tensors if role.startswith(ROLE)}
    return {role: tensor for role, tensor in tensors.items() if role not in copies}, copies


def _placed(primitive: Primitive, spot: Spot, dtype: torch.dtype | None) -> Primitive:
    """The primitive on the module's device; factors in the dtype they are multiplied in.

    Scales, gains, rotations and shifts stay float32: they are small, and an error in them is one of
    the whole output.
    """
    if isinstance(primitive, Layer):
        return settle(primitive, spot, dtype)
    device, compute = spot.device, dtype or spot.dtype
    if isinstance(primitive, LowRank) and primitive.rank_scale is not None and primitive.A.ndim < 3:
        return _kept(primitive, device)
    if isinstance(primitive, LowRank):
        wide, b = primitive.A.to(device), primitive.B.to(device)
        if primitive.out_scale is not None:  # folded in float32, rounded once
            b = b * primitive.out_scale.to(device)[..., None]
        if compute != torch.float32:
            half = wide.to(compute), b.to(compute)
            fits = all(map(is_finite, half))
            wide, b = half if fits else (wide, b)  # float32 where half precision would overflow
        return replace(primitive, A=wide.contiguous(), B=b.contiguous(), out_scale=None)
    if isinstance(primitive, DenseDelta):
        return DenseDelta(primitive.D.to(device, compute))
    if isinstance(primitive, InputRotation):
        return InputRotation(primitive.R.to(device, dtype or torch.float32))
    held = {field.name: getattr(primitive, field.name) for field in fields(primitive)}
    moved: dict[str, Any] = {name: _moved(value, device) for name, value in held.items()}
    return replace(primitive, **moved)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(each, device) for each in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _kept(primitive: LowRank, device: torch.device) -> LowRank:
    """Factors that other modules use as well stay what they are; the scales are the module's."""
    scales = {"out_scale": primitive.out_scale, "rank_scale": primitive.rank_scale}
    moved: dict[str, Any] = {n: s.to(device) for n, s in scales.items() if s is not None}
    return replace(primitive, **moved)
