"""Parts of the base that the inputs replace, blended: T0 + sum w (T - T0)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapterkit.hub.bases.base import CONV1D, EMBEDDING
from adapterkit.hub.fields import ReplacedFields
from adapterkit.hub.findings import clean
from adapterkit.hub.kinds.replaced import HEADS, belongs
from adapterkit.hub.mixing.inputs import Input, Place
from adapterkit.registry.errors import InvalidError

if TYPE_CHECKING:
    from adapterkit.hub.bases.base import Base

# Of weights that add up to 1: 0.7 + 0.2 + 0.1 is not 1.0.
ROUNDING = 1e-12


def blended(inputs: Sequence[Input]) -> dict[Place, Tensor]:
    """Every replaced part by place, as PEFT stores it. A part that one input alone replaces, at
    weight 1, is that input's bit for bit.

    Raises InvalidError for what has no weighted sum: a head of the adapters' own, other token rows,
    other shapes; NeedsBaseError where the base's values count and there is no base.
    """
    held: dict[Place, list[tuple[Input, Tensor]]] = {}
    for one in inputs:
        for place in one.replaced:
            held.setdefault(place, []).append((one, one.tensors[place]))
    return {place: _one(place, found, inputs) for place, found in held.items()}


def fields(inputs: Sequence[Input]) -> ReplacedFields:
    """What the config says of the replaced parts. Raises InvalidError where inputs contradict."""
    every = [one.adapter.fields.replaced for one in inputs if one.weight]
    tokens: dict[str, tuple[int, ...]] = {}
    for one in every:
        for entry, rows in one.tokens.items():
            if tokens.setdefault(entry, rows) != rows:
                where = clean(entry) or "the input embedding"
                raise InvalidError(
                    f"the adapters train different token rows of {where}",
                    hint="a recipe, or a merge, keeps them all",
                )
    biases = {one.bias for one in every}
    bias = next((word for word in ("all", "lora_only") if word in biases), "none")
    return ReplacedFields(bias, tokens, any(one.tie for one in every))


def _one(place: Place, held: Sequence[tuple[Input, Tensor]], inputs: Sequence[Input]) -> Tensor:
    module, role = place
    shapes = {tuple(tensor.shape) for _, tensor in held}
    if len(shapes) > 1:
        raise InvalidError(f"{clean(module)}: {role} has different shapes: {sorted(shapes)}")
    weights = [one.weight for one, _ in held]
    whole = math.fsum(weights)
    if len(held) == 1 and whole == 1:
        return held[0][1]
    base = inputs[0].ground.base
    if _is_own_head(module, base):
        names = ", ".join(f"{one.name}={one.weight:g}" for one, _ in held)
        raise InvalidError(
            f"{clean(module)} is a head of the adapters' own: it takes weight 1 from one adapter,"
            f" found {names}"
        )
    total = torch.stack([w * t for w, (_, t) in zip(weights, held, strict=True)]).sum(0)
    if abs(whole - 1) <= ROUNDING:
        return total
    return total + (1 - whole) * _base_value(held[0][0], module, role)


def _is_own_head(module: str, base: Base | None) -> bool:
    if base is None or module not in base.modules:
        return module.rpartition(".")[2] in HEADS
    row = base.modules[module]
    return not row.weight and row.tied_to is None


def _base_value(one: Input, module: str, role: str) -> Tensor:
    """What the base has there, as PEFT stores it."""
    ground = one.ground
    if role == "replace.bias":
        bias = ground.bias(module)
        if bias is None:
            raise InvalidError(f"{clean(module)} has no bias in {clean(_name(ground.base))}")
        return bias.double()
    table = ground.weight(module).double()
    row = ground.module(module)
    stored = table.mT if row.type in (CONV1D, EMBEDDING) else table
    if role != "tokens":
        return stored
    tokens: Mapping[str, tuple[int, ...]] = one.adapter.fields.replaced.tokens
    rows = next((rows for entry, rows in tokens.items() if belongs(module, entry)), ())
    return stored[list(rows)]


def _name(base: Base | None) -> str:
    return "the base" if base is None else base.name

