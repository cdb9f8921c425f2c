"""(IA)3 as AdapterHub has it: every vector scales outputs, y = alpha l * (W x + b).

In a module that is several matrices in one, those without a vector count as l = 1.
Liu et al. 2022, arXiv:2205.05638; adapters 1.3 `methods/lora.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Module
from adapterkit.hub.fields import FusedLoraFields
from adapterkit.hub.findings import Finding
from adapterkit.hub.kinds import replaced, targeted
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.fused_lora import TYPES, rows_in, rows_of
from adapterkit.hub.kinds.targeted import OUT, Form, Rules, Tensors
from adapterkit.hub.primitives import OutputGain

if TYPE_CHECKING:
    from torch import Tensor


class FusedIa3:
    def summary(self, adapter: Adapter) -> Summary:
        return Summary("IA3")

    def problems(self, adapter: Adapter) -> list[Finding]:
        return targeted.problems(adapter, _rules(adapter.fields))

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        fields: FusedLoraFields = adapter.fields
        found = targeted.schema(adapter, modules, _rules(fields))
        sized = {
            (name, role): Expected((rows_of(fields.parts(name), modules[name].n_out), 1))
            for name, role in found.tensors
            if role == "B"
        }
        return replace(found, tensors=found.tensors | sized)

    def lower(self, fields: FusedLoraFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        if "B" in p:
            gain = _whole(p["B"].flatten(), fields.parts(site.module.name))
            yield site.module.name, OutputGain(fields.alpha * gain)


def _rules(fields: FusedLoraFields) -> Rules:
    def form(module: str, tensors: Tensors) -> Form:
        return {"B": (OUT if all(fields.parts(module)) else None, 1)}

    return Rules(frozenset({"B"}), TYPES, form)


def _whole(gain: Tensor, parts: tuple[bool, ...]) -> Tensor:
    """The vector of all outputs, ones where a matrix has none."""
    height = len(gain) // sum(parts)
    whole = gain[rows_in(parts, height)]
    for at, enabled in enumerate(parts):
        if not enabled:
            whole[at * height : (at + 1) * height] = 1
    return whole
