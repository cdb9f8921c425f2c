"""LoHa, W' = W + s (A1 B1) * (A2 B2), elementwise.  Hyeon-Woo et al. 2021, arXiv:2108.06098."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import LINEAR, Module
from adapterkit.hub.fields import ProductFields
from adapterkit.hub.findings import Finding
from adapterkit.hub.kinds import replaced, targeted
from adapterkit.hub.kinds.base import Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.targeted import IN, OUT, Form, Rules, Tensors
from adapterkit.hub.primitives import DenseDelta, LowRank

if TYPE_CHECKING:
    from torch import Tensor

ROLES = ("w1_a", "w1_b", "w2_a", "w2_b")


class Loha:
    def summary(self, adapter: Adapter) -> Summary:
        return product_summary(adapter, "LoHa", ROLES)

    def problems(self, adapter: Adapter) -> list[Finding]:
        return targeted.problems(adapter, _rules(adapter.fields))

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        return targeted.schema(adapter, modules, _rules(adapter.fields))

    def lower(self, fields: ProductFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        if "w1_a" not in p:
            return
        name, scale = site.module.name, fields.scaling(site.module.name)
        w1_a, w1_b, w2_a, w2_b = (p[role] for role in ROLES)
        rank = w1_a.shape[1] * w2_a.shape[1]
        if rank * (len(w1_a) + w1_b.shape[1]) < len(w1_a) * w1_b.shape[1]:
            # the product of two sums is a sum over all pairs, so it has rank r * r
            b = (w1_a[:, :, None] * w2_a[:, None, :]).reshape(-1, rank)
            a = (w1_b[:, None, :] * w2_b[None, :, :]).reshape(rank, -1)
            yield name, LowRank(b, a, scale)
        else:
            yield name, DenseDelta(scale * (w1_a @ w1_b) * (w2_a @ w2_b))


def _rules(fields: ProductFields) -> Rules:
    def form(module: str, tensors: Tensors) -> Form:
        r = fields.rank_of(module)
        return {"w1_a": (OUT, r), "w1_b": (r, IN), "w2_a": (OUT, r), "w2_b": (r, IN)}

    return Rules(frozenset(ROLES), (LINEAR,), form)


def product_summary(adapter: Adapter, variant: str, roles: tuple[str, ...]) -> Summary:
    fields: ProductFields = adapter.fields
    names = [n for n, held in adapter.modules.items() if any(role in held for role in roles)]
    alphas = {fields.alphas.get(name, fields.alpha) for name in names}
    return Summary(variant, tuple(map(fields.rank_of, names)), tuple(sorted(alphas)))
