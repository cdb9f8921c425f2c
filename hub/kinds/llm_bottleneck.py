"""Bottlenecks on single linear layers, a(v) = s W_up act(W_down v), without biases.

Hu et al. 2023 (LLM-Adapters), arXiv:2304.01933.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import CONV1D, LINEAR, Module
from adapterkit.hub.bases.places import Place
from adapterkit.hub.fields import LlmBottleneckFields, Wiring
from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding
from adapterkit.hub.kinds import replaced, targeted
from adapterkit.hub.kinds.base import Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.targeted import IN, OUT, Form, Rules, Tensors
from adapterkit.hub.primitives import Bottleneck

if TYPE_CHECKING:
    from torch import Tensor

ROLES, TYPES = frozenset({"down", "up", "scaling"}), (LINEAR, CONV1D)
# By the last name of the module, in the table of every model type that the fork has: in front of
# the module, and behind it.
BEFORE = frozenset({"gate_proj", "up_proj", "dense_h_to_4h", "fc_in", "c_fc", "fc1"})
BEHIND = frozenset({"down_proj", "dense_4h_to_h", "fc_out", "c_proj", "fc2"})


class LlmBottleneck:
    def summary(self, adapter: Adapter) -> Summary:
        fields: LlmBottleneckFields = adapter.fields
        kind = "parallel" if fields.parallel else "series"
        return Summary(f"LLM-Adapters {kind} bottleneck", (fields.size,) * len(adapter.modules))

    def problems(self, adapter: Adapter) -> list[Finding]:
        found = targeted.problems(adapter, _rules(adapter.fields))
        if not adapter.fields.parallel:
            names = {module.rpartition(".")[2] for module in adapter.modules} - BEFORE - BEHIND
            known = ", ".join(sorted(BEFORE | BEHIND))
            found += [
                Finding(ERROR, UNSUPPORTED, "target_modules", f"one of {known}", name)
                for name in sorted(names)
            ]
        return found

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        return targeted.schema(adapter, modules, _rules(adapter.fields))

    def lower(self, fields: LlmBottleneckFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        if "down" not in p:
            return
        name = site.module.name
        entry = not fields.parallel and name.rpartition(".")[2] in BEFORE
        yield (
            name,
            Bottleneck(
                Place(name, name, entry=entry),
                p["down"],
                p["up"],
                act=fields.act,
                scale=p["scaling"] if fields.learned else fields.scaling,
                wiring=Wiring(parallel=fields.parallel),
            ),
        )


def _rules(fields: LlmBottleneckFields) -> Rules:
    """What it reads and gives has one width: that of the side it stands on."""

    def form(module: str, tensors: Tensors) -> Form:
        before = module.rpartition(".")[2] in BEFORE
        n_in = IN if fields.parallel or before else OUT
        n_out = OUT if fields.parallel or not before else IN
        scaling: Form = {"scaling": (1,)} if fields.learned else {}
        return {"down": (fields.size, n_in), "up": (n_out, fields.size), **scaling}

    return Rules(ROLES, TYPES, form)
