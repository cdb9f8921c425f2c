"""DoRA as AdapterHub has it, y = f * (W x + b + s B A x) with f = m / |W + B A|_row.

The norm lacks the scale and the bias is scaled, unlike in PEFT.  adapters 1.3 `methods/lora.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import LINEAR, Module
from adapterkit.hub.fields import LoraFields
from adapterkit.hub.findings import Finding
from adapterkit.hub.kinds import replaced, targeted
from adapterkit.hub.kinds.base import Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.lora import row_norms
from adapterkit.hub.kinds.targeted import IN, OUT, Form, Rules, Tensors
from adapterkit.hub.primitives import BiasShift, LowRank, Primitive, RowScale

if TYPE_CHECKING:
    from torch import Tensor


class OutputDora:
    def summary(self, adapter: Adapter) -> Summary:
        fields: LoraFields = adapter.fields
        names = [name for name, held in adapter.modules.items() if "A" in held]
        return Summary("DoRA", tuple(map(fields.rank_of, names)), (fields.alpha,))

    def problems(self, adapter: Adapter) -> list[Finding]:
        return targeted.problems(adapter, _rules(adapter.fields))

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        return targeted.schema(adapter, modules, _rules(adapter.fields))

    def lower(self, fields: LoraFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        if "magnitude" in p:
            name = site.module.name
            for made in scaled(site, LowRank(p["B"], p["A"], fields.scaling(name)), p["magnitude"]):
                yield name, made


def scaled(site: Site, low: LowRank, magnitude: Tensor) -> Iterator[Primitive]:
    """f * (W x + b + s B A x) as what it adds to W x + b. magnitude (out, 1)."""
    f = magnitude.flatten() / row_norms(site.weight(), low.B, low.A, 1.0)
    yield LowRank(low.B, low.A, low.scale, out_scale=f)
    yield RowScale(f - 1)
    bias = site.bias()
    if bias is not None:
        yield BiasShift((f - 1) * bias.to(f))


def _rules(fields: LoraFields) -> Rules:
    def form(module: str, tensors: Tensors) -> Form:
        rank = fields.rank_of(module)
        return {"A": (rank, IN), "B": (OUT, rank), "magnitude": (OUT, 1)}

    return Rules(frozenset({"A", "B", "magnitude"}), (LINEAR,), form)
