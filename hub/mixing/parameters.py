"""Adapters of one format and one config as one of these, tensor by tensor.

What AdapterHub's average_adapter does with `linear`: where the effect is no linear function of the
parameters, as of networks, it is not the average of the effects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from adapterkit.hub.bases.base import Base
from adapterkit.hub.blend.parameters import total
from adapterkit.hub.findings import clean
from adapterkit.hub.formats import again
from adapterkit.hub.formats.peft_write import Part, Place, is_replacing
from adapterkit.hub.mixing import replaced
from adapterkit.hub.mixing.inputs import Input, joined
from adapterkit.hub.mixing.options import Options
from adapterkit.hub.mixing.result import KEEP, averaged, parts_of, require, result, variant
from adapterkit.hub.mixing.written import Blend, common
from adapterkit.registry.errors import InvalidError, MismatchError

if TYPE_CHECKING:
    from torch import Tensor

METHODS = ("average",)


def blended(inputs: Sequence[Input], base: Base | None, chosen: Options) -> Blend:
    require(inputs, chosen, METHODS)
    require_alike(inputs)
    every = averaged(joined(inputs))
    parts = parts_of(tensors_of(every) | replaced.blended(every), chosen)
    return result(inputs, base, chosen, files(every, parts), parts)


def tensors_of(inputs: Sequence[Input]) -> dict[Place, Tensor]:
    """The weighted sum of each, without what they replace."""
    weights = [one.weight for one in inputs]
    places = [place for place in inputs[0].tensors if not is_replacing(place[1])]
    return {place: total([one.tensors[place] for one in inputs], weights) for place in places}


def files(inputs: Sequence[Input], parts: Mapping[Place, Part], **changes: Any) -> dict[str, bytes]:
    """A folder of their format. Raises InvalidError for one that is not written."""
    first = inputs[0]
    if first.adapter.format == "adapterhub":
        return again.adapterhub(first.folder, first.adapter, parts, changes)
    if first.adapter.format == "peft":
        about = common(inputs)
        named = {"base_model_name_or_path": about.base_name, "revision": about.revision}
        return again.peft([one.adapter for one in inputs], parts, {**named, **changes})
    raise InvalidError(
        f"{variant(first)} is of the format {first.adapter.format}, which is not written",
        hint="adapter export --format peft writes it for PEFT first",
    )


def require_alike(inputs: Sequence[Input]) -> None:
    """Raises MismatchError with all in which they differ."""
    first = inputs[0]
    faults = []
    for other in inputs[1:]:
        faults += [f"{variant(other)}: {fault}" for fault in _differences(first, other)]
    if faults:
        shown = "; ".join(faults[:20])
        raise MismatchError(f"not of one config with {variant(first)}: {shown}", hint=KEEP)


def _differences(one: Input, other: Input) -> list[str]:
    a, b = one.adapter, other.adapter
    found = [
        f"{name} {clean(str(y), 60)}, not {clean(str(x), 60)}"
        for name, x, y in (("kind", a.kind, b.kind), ("format", a.format, b.format))
        if x != y
    ]
    if found:
        return found
    pairs = [(each.name, getattr(a.fields, each.name), getattr(b.fields, each.name))
             for each in fields(a.fields)]  # fmt: skip
    pairs += [(name, a.requires[name], b.requires.get(name)) for name in a.requires]
    found = [f"{n} is {clean(str(y), 60)}, not {clean(str(x), 60)}" for n, x, y in pairs if x != y]
    shapes = [{p: t.shape for p, t in c.tensors.items()} for c in (a, b)]
    for module, role in sorted(shapes[0].keys() | shapes[1].keys()):
        x, y = (each.get((module, role)) for each in shapes)
        if x != y and not is_replacing(role):
            where = clean(f"{module} {role}".strip())
            found.append(f"{where} is {_shape(y)}, not {_shape(x)}")
    return found


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))
