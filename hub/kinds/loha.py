"""LoHa, W' = W + s (A1 B1) * (A2 B2), elementwise.  Hyeon-Woo et al. 2021, arXiv:2108.06098."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import CONV, LINEAR, Module
from adapterkit.hub.fields import ProductFields
from adapterkit.hub.findings import Finding
from adapterkit.hub.kinds import replaced, targeted
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.targeted import IN, OUT, Form, Rules, Tensors
from adapterkit.hub.primitives import DenseDelta, LowRank

if TYPE_CHECKING:
    from torch import Tensor

ROLES = ("w1_a", "w1_b", "w2_a", "w2_b")
# Of convolutions, which may be products of three: a core (r, r, kernel) between the two.
CORES = ("t1", "t2")


class Loha:
    def summary(self, adapter: Adapter) -> Summary:
        return product_summary(adapter, "LoHa", ROLES)

    def problems(self, adapter: Adapter) -> list[Finding]:
        return targeted.problems(adapter, _rules(adapter.fields))

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        plain = targeted.schema(adapter, modules, _rules(adapter.fields))
        tensors = dict(plain.tensors)
        for (name, role), expected in plain.tensors.items():
            module, held = modules[name], adapter.modules.get(name, {})
            if module.type == CONV and "t1" in held and role in CORES:
                tensors[name, role] = Expected((*expected.shape[:2], *kernel(module)))
            elif module.type == CONV and "t1" in held and role in ("w1_b", "w2_b"):
                tensors[name, role] = Expected((expected.shape[0], module.shape[1]))
        return Schema(tensors, plain.findings)

    def lower(self, fields: ProductFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        if "w1_a" not in p:
            return
        name, scale = site.module.name, fields.scaling(site.module.name)
        w1_a, w1_b, w2_a, w2_b = (p[role] for role in ROLES)
        if "t1" in p and "t2" in p:
            product = cored(p["t1"], w1_a, w1_b) * cored(p["t2"], w2_a, w2_b)
            yield name, DenseDelta(scale * product)
            return
        rank = w1_a.shape[1] * w2_a.shape[1]
        n_out, n_in = len(w1_a), w1_b.shape[1]
        if site.module.groups == 1 and rank * (n_out + n_in) < n_out * n_in:
            # the product of two sums is a sum over all pairs, so it has rank r * r
            b = (w1_a[:, :, None] * w2_a[:, None, :]).reshape(-1, rank)
            a = (w1_b[:, None, :] * w2_b[None, :, :]).reshape(rank, -1)
            yield name, LowRank(b, a, scale)
        else:
            yield name, DenseDelta(scale * (w1_a @ w1_b) * (w2_a @ w2_b))


def cored(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum_ij core_ij a_i b_j for every place of the kernel, as a matrix (out, in k).  core
    (r, r, k, k), a (r, out), b (r, in)."""
    import torch

    whole = torch.einsum("ijkl,ip,jq->pqkl", core, a, b)
    return whole.flatten(1)


def kernel(module: Module) -> tuple[int, ...]:
    """As a core has it: with two sides."""
    sides = module.shape[2:]
    return sides if len(sides) > 1 else (*sides, 1)


def _rules(fields: ProductFields) -> Rules:
    def form(module: str, tensors: Tensors) -> Form:
        r = fields.rank_of(module)
        if all(role in tensors for role in CORES):
            core, whole, part = (r, r, None, None), (r, OUT), (r, None)
            return {
                "t1": core, "t2": core, "w1_a": whole, "w1_b": part, "w2_a": whole, "w2_b": part,
            }  # fmt: skip
        return {"w1_a": (OUT, r), "w1_b": (r, IN), "w2_a": (OUT, r), "w2_b": (r, IN)}

    return Rules(frozenset((*ROLES, *CORES)), (LINEAR, CONV), form)


def product_summary(adapter: Adapter, variant: str, roles: tuple[str, ...]) -> Summary:
    fields: ProductFields = adapter.fields
    names = [n for n, held in adapter.modules.items() if any(role in held for role in roles)]
    alphas = {fields.alphas.get(name, fields.alpha) for name in names}
    return Summary(variant, tuple(map(fields.rank_of, names)), tuple(sorted(alphas)))
