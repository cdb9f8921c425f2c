"""What a blend of like adapters may be told, and how it is handed out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.hub.bases.base import Base
from adapterkit.hub.blend.methods import method
from adapterkit.hub.blend.parameters import shares
from adapterkit.hub.convert import DTYPES
from adapterkit.hub.findings import clean
from adapterkit.hub.formats.peft_write import Part, Place
from adapterkit.hub.kinds import kind
from adapterkit.hub.mixing.inputs import Input
from adapterkit.hub.mixing.options import Options
from adapterkit.hub.mixing.run import settings_of
from adapterkit.hub.mixing.written import Blend, origin
from adapterkit.registry.errors import InvalidError

if TYPE_CHECKING:
    from torch import Tensor

KEEP = "--as recipe keeps the weighted sum of any versions exactly, by reference"


def variant(one: Input) -> str:
    return f"{one.name} ({kind(one.adapter.kind).summary(one.adapter).variant})"


def require(inputs: Sequence[Input], chosen: Options, methods: Collection[str]) -> None:
    """Raises InvalidError for a method of another dialect, and for what only changes of weights
    can be told."""
    method(chosen.method, settings_of(inputs, chosen))
    name = variant(inputs[0])
    if chosen.method not in methods:
        raise InvalidError(
            f"{name}: {chosen.method} is for changes of weights; here there is {_or(methods)}",
            hint=KEEP,
        )
    for option, is_given in (("rank", chosen.rank is not None), ("at", bool(chosen.at))):
        if is_given:
            raise InvalidError(f"{name}: {option} is for changes of weights", hint=KEEP)


def _or(methods: Collection[str]) -> str:
    return " and ".join(methods)


def averaged(inputs: Sequence[Input]) -> list[Input]:
    """The same inputs, their weights adding up to 1."""
    weights = shares([one.weight for one in inputs])
    return [replace(one, weight=w) for one, w in zip(inputs, weights, strict=True)]


def parts_of(
    tensors: Mapping[Place, Tensor], chosen: Options, default: str = "float32"
) -> dict[Place, Part]:
    """In the dtype asked for. Raises InvalidError for what is too large for it."""
    from adapterkit.hub.factored import part
    from adapterkit.hub.tensors import DTYPES as TORCH
    from adapterkit.hub.tensors import is_finite

    name = chosen.dtype or default
    cast = {place: tensor.to(TORCH[DTYPES[name]]) for place, tensor in tensors.items()}
    large = [clean(f"{module} {role}") for (module, role), t in cast.items() if not is_finite(t)]
    if large:
        raise InvalidError(f"too large for {name}: {', '.join(large[:10])}", hint="--dtype float32")
    return {place: part(tensor, DTYPES[name]) for place, tensor in cast.items()}


def result(
    inputs: Sequence[Input],
    base: Base | None,
    chosen: Options,
    files: Mapping[str, bytes],
    parts: Mapping[Place, Part],
) -> Blend:
    """Read back: what was written is what is read."""
    made = Blend(
        " + ".join(f"{one.weight:g} {one.name}" for one in inputs),
        files,
        origin(inputs, base, chosen),
        dtype=DTYPES[chosen.dtype or "float32"],
    )
    found = made.adapter.tensors
    if {place: stored.shape for place, stored in found.items()} != {
        place: part.shape for place, part in parts.items()
    }:
        raise InvalidError(f"{clean(made.name)} cannot be written: other tensors would be read")
    return made
