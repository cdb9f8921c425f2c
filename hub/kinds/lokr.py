"""LoKr, W' = W + s kron(W1, W2), each factor whole or a product.

Edalati et al. 2022, arXiv:2212.10650; Yeh et al. 2023 (LyCORIS), arXiv:2309.14859.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import CONV, LINEAR, Module
from adapterkit.hub.fields import ProductFields
from adapterkit.hub.findings import ERROR, Finding
from adapterkit.hub.headers import Stored
from adapterkit.hub.kinds import replaced, targeted
from adapterkit.hub.kinds.base import Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.loha import cored, kernel, product_summary
from adapterkit.hub.kinds.targeted import Form, Rules, Tensors
from adapterkit.hub.primitives import DenseDelta, LowRank

if TYPE_CHECKING:
    from torch import Tensor

ROLES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")


class Lokr:
    def summary(self, adapter: Adapter) -> Summary:
        return product_summary(adapter, "LoKr", ROLES)

    def problems(self, adapter: Adapter) -> list[Finding]:
        return targeted.problems(adapter, _rules(adapter.fields))

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        """How W is split is the writer's choice: any split whose product has its shape will do."""
        plain = targeted.schema(adapter, modules, _rules(adapter.fields))
        held = adapter.modules
        findings = list(plain.findings)
        tensors = dict(plain.tensors)
        for (name, role), expected in plain.tensors.items():
            stored = held.get(name, {}).get(role)
            if role in ROLES and stored is not None and expected.required:
                tensors[name, role] = type(expected)(_expected(modules[name], role, stored.shape))
        for name in {name for name, role in plain.tensors if role in ROLES}:
            findings += _product_faults(modules[name], held.get(name, {}))
        return Schema(tensors, tuple(findings))

    def lower(self, fields: ProductFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        if not any(role in p for role in ROLES):
            return
        name, scale = site.module.name, fields.scaling(site.module.name)
        if "w2" in p and len(p["w2"].shape) == 3:
            yield name, DenseDelta(scale * _line(_pair(p, "w1"), p["w2"]))
            return
        (b1, a1), (b2, a2) = _pair(p, "w1"), _pair(p, "w2")
        n_out, n_in = len(b1) * len(b2), a1.shape[1] * a2.shape[1]
        if site.module.groups == 1 and len(a1) * len(a2) * (n_out + n_in) < n_out * n_in:
            # kron(B1 A1, B2 A2) = kron(B1, B2) kron(A1, A2)
            yield name, LowRank(_kron(b1, b2), _kron(a1, a2), scale)
        else:
            yield name, DenseDelta(scale * _kron(b1 @ a1, b2 @ a2))


def _expected(module: Module, role: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Any split of the channels, but no other kernel than the module's."""
    if module.type != CONV or len(shape) < 3:
        return shape if len(shape) == 2 else shape[:2]
    sides = kernel(module) if role == "t2" else module.shape[2:]
    return (*shape[:2], *sides)


def _line(w1: tuple[Tensor, Tensor], w2: Tensor) -> Tensor:
    """(out, in k) of a whole factor (out, in, k) as PEFT takes it: the product with w1 runs over
    the last two dimensions, not the first two (peft 0.21 `tuners/lokr/layer.py`, make_kron)."""
    import torch

    b, a = w1
    whole = torch.kron((b @ a)[None].contiguous(), w2.contiguous())
    return whole.reshape(len(b) * len(w2), -1)


def _pair(p: Mapping[str, Tensor], factor: str) -> tuple[Tensor, Tensor]:
    """(B, A) whose product is the factor; for a whole one, one of them is the identity."""
    if factor == "w2" and "t2" in p:
        w = cored(p["t2"], p["w2_a"], p["w2_b"])
    elif factor in p:
        w = p[factor].reshape(len(p[factor]), -1)  # a kernel counts as inputs
    else:
        return p[f"{factor}_a"], p[f"{factor}_b"]
    n_out, n_in = w.shape
    size = range(min(n_out, n_in))
    one = 0 * w[: len(size), : len(size)]
    one[list(size), list(size)] = 1
    return (w, one) if n_in <= n_out else (one, w)


def _kron(a: Tensor, b: Tensor) -> Tensor:
    n_out, n_in = len(a) * len(b), a.shape[1] * b.shape[1]
    return (a[:, None, :, None] * b[None, :, None, :]).reshape(n_out, n_in)


def _rules(fields: ProductFields) -> Rules:
    def form(module: str, tensors: Tensors) -> Form:
        rank = fields.rank_of(module)
        found: dict[str, tuple[int | str | None, ...]] = {}
        for factor in ("w1", "w2"):
            parts = (f"{factor}_a", f"{factor}_b")
            if factor in tensors or not any(part in tensors for part in parts):
                is_kernel = factor in tensors and factor == "w2" and len(tensors[factor].shape) > 2
                found[factor] = (None,) * len(tensors[factor].shape) if is_kernel else (None, None)
            elif factor == "w2" and "t2" in tensors:
                found |= {parts[0]: (rank, None), parts[1]: (rank, None)}
                found["t2"] = (rank, rank, None, None)
            else:
                found |= {parts[0]: (None, rank), parts[1]: (rank, None)}
        return found

    return Rules(frozenset(ROLES), (LINEAR, CONV), form)


def _product_faults(module: Module, tensors: Mapping[str, Stored]) -> list[Finding]:
    """Of two factors whose sizes do not multiply to those of the module. Either may be wrong, so
    both are named."""
    found = []
    for axis, wanted in ((0, module.n_out), (1, module.n_in)):
        parts = [part for f in ("w1", "w2") if (part := _part(tensors, f, axis)) is not None]
        sizes = [size for f in ("w1", "w2") if (size := _size(tensors, f, axis)) is not None]
        if len(parts) < 2 or len(sizes) < 2:
            continue  # missing or misshapen, which is said already
        if sizes[0] * sizes[1] != wanted:
            sides = "inputs" if axis else "outputs"
            want, has = f"factors that make {wanted} {sides}", f"{sizes[0]} times {sizes[1]}"
            found += [Finding(ERROR, "shape-mismatch", p.key, want, has) for p in parts]
    return found


def _size(tensors: Mapping[str, Stored], factor: str, axis: int) -> int | None:
    """The factor's outputs (axis 0), or inputs, of a kernel all of it (axis 1)."""
    part, core = _part(tensors, factor, axis), tensors.get("t2") if factor == "w2" else None
    if part is None or len(part.shape) < 2 or (core is not None and len(core.shape) != 4):
        return None
    if core is not None:
        return part.shape[1] * (prod(core.shape[2:]) if axis else 1)
    return prod(part.shape[1:]) if axis else part.shape[0]


def _part(tensors: Mapping[str, Stored], factor: str, axis: int) -> Stored | None:
    """The tensor that has the factor's outputs (axis 0) or inputs (axis 1)."""
    return tensors.get(factor) or tensors.get(f"{factor}_{'ab'[axis]}")
