"""AdaLoRA, W' = W + s B diag(E) A.  Zhang et al. 2023, arXiv:2303.10512."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import CONV1D, LINEAR, Module
from adapterkit.hub.fields import AdaloraFields
from adapterkit.hub.findings import Finding
from adapterkit.hub.kinds import replaced, targeted
from adapterkit.hub.kinds.base import Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.targeted import IN, OUT, Form, Rules, Tensors
from adapterkit.hub.primitives import LowRank

if TYPE_CHECKING:
    from torch import Tensor

ROLES = frozenset({"A", "B", "E"})


class Adalora:
    def summary(self, adapter: Adapter) -> Summary:
        fields: AdaloraFields = adapter.fields
        names = [name for name, held in adapter.modules.items() if "E" in held]
        return Summary("AdaLoRA", tuple(map(fields.rank_of, names)), (fields.alpha,))

    def problems(self, adapter: Adapter) -> list[Finding]:
        return targeted.problems(adapter, _rules(adapter.fields))

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        return targeted.schema(adapter, modules, _rules(adapter.fields))

    def lower(self, fields: AdaloraFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        if "E" not in p:
            return
        name, a, b, e = site.module.name, p["A"], p["B"], p["E"]
        if len(e):  # pruning may leave nothing of a module
            yield name, LowRank(b, a * e, fields.scaling(name))


def _rules(fields: AdaloraFields) -> Rules:
    def form(module: str, tensors: Tensors) -> Form:
        rank = fields.rank_of(module)
        return {"A": (rank, IN), "E": (rank, 1), "B": (OUT, rank)}

    return Rules(ROLES, (LINEAR, CONV1D), form)
