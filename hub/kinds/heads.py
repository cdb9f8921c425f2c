"""A head of several linear layers that takes the place of the base's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.bases.base import Module
from adapterkit.hub.fields import HEAD, HeadFields
from adapterkit.hub.kinds.base import Expected, Lowered
from adapterkit.hub.primitives import FirstToken, Head

if TYPE_CHECKING:
    from torch import Tensor


def schema(fields: HeadFields, modules: Mapping[str, Module]) -> dict[tuple[str, str], Expected]:
    """Nothing where the base has no head of this task: then no tensor of it has a place."""
    leaf = modules.get(fields.seat.leaf)
    if leaf is None:
        return {}
    found: dict[tuple[str, str], Expected] = {}
    for layer in range(fields.layers):
        is_last = layer == fields.layers - 1
        rows = fields.labels if is_last else leaf.n_in
        found[leaf.name, f"{HEAD}{layer}.weight"] = Expected((rows, leaf.n_in))
        if fields.bias or not is_last:
            found[leaf.name, f"{HEAD}{layer}.bias"] = Expected((rows,))
    return found


def lower(fields: HeadFields, p: Mapping[str, Tensor]) -> Lowered:
    seat = fields.seat
    numbers = range(fields.layers)
    weights = tuple(p[f"{HEAD}{layer}.weight"] for layer in numbers)
    biases = tuple(
        p[f"{HEAD}{layer}.bias"] if fields.bias or layer < numbers[-1] else None
        for layer in numbers
    )
    yield seat.module, Head(weights, biases, fields.act, seat.first)
    if not fields.pools:
        yield seat.pooler, FirstToken()
