"""The adapters of a blend, read, checked against each other and put in an order of their own."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Base
from adapterkit.hub.describe import tensors_root
from adapterkit.hub.findings import clean
from adapterkit.hub.formats.peft_write import is_replacing
from adapterkit.hub.kinds import kind
from adapterkit.hub.kinds.base import Whole
from adapterkit.hub.locate import Source, locate
from adapterkit.hub.offline import Ground, lowered_at, not_weights
from adapterkit.hub.read import read_adapter
from adapterkit.hub.rooting import rooted
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import AdapterWarning, InvalidError, MismatchError

if TYPE_CHECKING:
    from torch import Tensor

    from adapterkit.hub.primitives import Primitive
    from adapterkit.registry import Registry

Place = tuple[str, str]
Weighted = Mapping[Source, float] | Sequence[Source | tuple[Source, float]]


@dataclass(frozen=True)
class Input:
    """One adapter of a blend. index: its place in the order that the contents give, whatever the
    order they were named in; given: its place in that."""

    name: str
    weight: float
    folder: Folder
    ground: Ground
    root: str
    given: int
    index: int = 0

    @property
    def adapter(self) -> Adapter:
        return self.ground.adapter

    @cached_property
    def tensors(self) -> Mapping[Place, Tensor]:
        """Of the kind's own, and what replaces parts of the base. float64, but for plain factors:
        nothing is computed with those before they are put side by side."""
        from adapterkit.hub.tensors import read_finite

        return {
            place: tensor if self.is_plain and not is_replacing(place[1]) else tensor.double()
            for place, tensor in read_finite(self.adapter).items()
            if not place[1].startswith("wrapper.")
        }

    @property
    def is_plain(self) -> bool:
        """Whether it is nothing but factors."""
        fields = self.adapter.fields
        return self.adapter.kind == "lora" and not fields.dora and not fields.lora_bias

    @cached_property
    def modules(self) -> list[str]:
        """Those it changes otherwise than by replacing parts of them."""
        own = {module for module, role in self.adapter.tensors if not is_replacing(role)}
        return [name for name in self.adapter.modules if name in own]

    @property
    def replaced(self) -> list[Place]:
        return [place for place in self.tensors if is_replacing(place[1])]

    def primitives(self, module: str) -> tuple[Primitive, ...]:
        """What it does to one module, without what it replaces there."""
        return lowered_at(self.ground, module, self._own)

    @cached_property
    def _own(self) -> Mapping[Place, Tensor]:
        return {place: t for place, t in self.tensors.items() if not is_replacing(place[1])}


def pairs(sources: Weighted) -> list[tuple[Source, float]]:
    """(source, weight); 1 where none is given. Raises InvalidError for what is no finite number."""
    from adapterkit.hub.compose.weighing import is_weight

    given: list[tuple[Source, float]] = []
    for item in sources.items() if isinstance(sources, Mapping) else sources:
        given.append(item if isinstance(item, tuple) else (item, 1.0))
    wrong = [f"{source}={weight!r}" for source, weight in given if not is_weight(weight)]
    if wrong:
        raise InvalidError(f"weights must be finite numbers, found {clean(', '.join(wrong))}")
    if not given:
        raise InvalidError("a blend needs one adapter or more")
    return given


def read_inputs(
    given: Iterable[tuple[Source, float]],
    base: Base | None,
    quantization: str | None,
    registry: Registry | None,
    allow_fields: Collection[str],
) -> list[Input]:
    """Sorted by their contents. Raises what reading raises; MismatchError if they were made for
    different bases."""
    found = []
    for place, (source, weight) in enumerate(given):
        folder = locate(source, registry)
        adapter = read_adapter(folder, allow_fields)
        adapter.require_sound()
        adapter = adapter if base is None else rooted(adapter, base)
        ground = Ground.of(adapter, base, quantization)
        root = _root(folder, adapter)
        found.append(Input(clean(folder.name), float(weight), folder, ground, root, place))
    _require_one_base(found)
    _require_one_shape(found)
    found.sort(key=lambda one: (one.root, one.name, one.weight))
    return [replace(one, index=index) for index, one in enumerate(found)]


def _root(folder: Folder, adapter: Adapter) -> str:
    """Of a version, as its manifest has it, which was checked when it arrived."""
    record = folder.manifest.adapter.get("tensors") if folder.manifest is not None else None
    known = record.get("root") if isinstance(record, Mapping) else None
    return known if isinstance(known, str) else f"sha256:{tensors_root(adapter.tensors)}"


def joined(inputs: Sequence[Input]) -> list[Input]:
    """The same adapter named twice is one with both weights: what cancels is gone exactly."""
    found: dict[tuple[str, str], Input] = {}
    for one in inputs:
        key = one.root, repr(one.adapter.fields)
        seen = found.get(key)
        found[key] = one if seen is None else replace(seen, weight=seen.weight + one.weight)
    left = [one for one in found.values() if one.weight]
    if not left:
        raise InvalidError("nothing is left: the weights cancel")
    return left


def require_weights(inputs: Iterable[Input], hint: str | None = None) -> None:
    """Raises InvalidError for an adapter that acts elsewhere than in weights."""
    for one in inputs:
        adapter, base = one.adapter, one.ground.base
        if not isinstance(kind(adapter.kind), Whole):
            continue
        weights = () if base is None else base.modules
        elsewhere = [module for module, _ in adapter.tensors if module not in weights]
        if elsewhere:
            error = not_weights(adapter, elsewhere[0])
            error.hint = hint
            raise error


def _require_one_base(inputs: Sequence[Input]) -> None:
    layouts: dict[object, str] = {}
    for one in inputs:
        record = (one.folder.manifest.base or {}) if one.folder.manifest is not None else {}
        layout = record.get("layout")
        if isinstance(layout, Mapping):
            layouts.setdefault(layout.get("root"), one.name)
    if len(layouts) > 1:
        shown = "; ".join(f"{name}: {clean(str(root))}" for root, name in layouts.items())
        raise MismatchError(f"the adapters were made for bases of different layout: {shown}")
    names = {one.adapter.base_name: one.name for one in inputs if one.adapter.base_name}
    if len(names) > 1 and not layouts:
        shown = ", ".join(f"{name} for {clean(str(base))}" for base, name in names.items())
        text = f"the adapters name different bases: {shown}"
        warnings.warn(text, AdapterWarning, stacklevel=4)


def _require_one_shape(inputs: Sequence[Input]) -> None:
    """Tensors of the same role in the same module that cannot belong to one weight."""
    axes = {"A": 1, "B": 0, "embedding_A": 1, "embedding_B": 0}
    seen: dict[Place, tuple[int, str]] = {}
    faults = []
    for one in inputs:
        for (module, role), stored in one.adapter.tensors.items():
            if role not in axes or len(stored.shape) != 2:
                continue
            size = stored.shape[axes[role]]
            first, name = seen.setdefault((module, role), (size, one.name))
            if first != size:
                sides = f"{name} has {first}, {one.name} {size}"
                faults.append(f"{clean(module)}: {role} of different size, {sides}")
    if faults:
        raise MismatchError("the adapters do not change one model: " + "; ".join(faults[:20]))
