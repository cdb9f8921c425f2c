"""VeRA as AdapterHub has it, W' = W + s U B D A: A and B are the same for all modules, U (out, out)
and D (r, r) start as diagonal matrices and are trained whole.

Kopiczko et al. 2023, arXiv:2310.11454; adapters 1.3 `methods/lora.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import LINEAR, Module
from adapterkit.hub.fields import FusedLoraFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding
from adapterkit.hub.kinds import replaced, targeted
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.output_dora import scaled
from adapterkit.hub.kinds.targeted import OUT, Form, Rules, Tensors
from adapterkit.hub.primitives import LowRank

if TYPE_CHECKING:
    from torch import Tensor

A, B = "shared_A", "shared_B"


class SquareVera:
    def summary(self, adapter: Adapter) -> Summary:
        fields: FusedLoraFields = adapter.fields
        names = [name for name, held in adapter.modules.items() if "outer" in held]
        variant = "VeRA+DoRA" if fields.dora else "VeRA"
        return Summary(variant, (fields.rank,) * len(names), (fields.alpha,))

    def problems(self, adapter: Adapter) -> list[Finding]:
        found = targeted.problems(adapter, _rules(adapter.fields))
        return found + list(_shared_faults(adapter))

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        fields: FusedLoraFields = adapter.fields
        found = targeted.schema(adapter, modules, _rules(fields))
        targets = [modules[name] for name, role in found.tensors if role == "outer"]
        sizes = sorted({(module.n_out, module.n_in) for module in targets})
        if len(sizes) != 1:
            about = f"modules of {sizes}"
            odd = Finding(ERROR, UNSUPPORTED, "attn_matrices", "modules of one size", about)
            return replace(found, findings=(*found.findings, odd))
        ((n_out, n_in),) = sizes
        shapes = {A: (fields.rank, n_in), B: (n_out, fields.rank)}
        whole = {("", role): Expected(shape, required=False) for role, shape in shapes.items()}
        return replace(found, tensors=found.tensors | whole)  # their absence is said by `problems`

    def lower(self, fields: FusedLoraFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        if "outer" not in p:
            return
        name, scale = site.module.name, fields.scaling(site.module.name)
        low = _factors(site, p["outer"], p["inner"], scale)
        if "magnitude" not in p:
            yield name, low
            return
        folded = LowRank(p["outer"] @ site.shared[B].to(p["outer"]), _inner(site, p), scale)
        for made in scaled(site, folded, p["magnitude"]):
            yield name, made


def _factors(site: Site, outer: Tensor, inner: Tensor, scale: float) -> LowRank:
    """Diagonal matrices are scales of the shared factors, which then stay shared."""
    a, b = site.shared[A], site.shared[B]
    if _is_diagonal(outer) and _is_diagonal(inner):
        return LowRank(b, a, scale, out_scale=outer.diagonal() + 0, rank_scale=inner.diagonal() + 0)
    return LowRank(outer @ b.to(outer), inner @ a.to(inner), scale)


def _inner(site: Site, p: Mapping[str, Tensor]) -> Tensor:
    return p["inner"] @ site.shared[A].to(p["inner"])


def _is_diagonal(matrix: Tensor) -> bool:
    return bool((matrix - matrix.diagonal().diag()).count_nonzero() == 0)


def _rules(fields: FusedLoraFields) -> Rules:
    roles: dict[str, tuple[int | str | None, ...]] = {
        "outer": (OUT, OUT),
        "inner": (fields.rank, fields.rank),
    }
    roles |= {"magnitude": (OUT, 1)} if fields.dora else {}

    def form(module: str, tensors: Tensors) -> Form:
        return roles

    return Rules(frozenset({"outer", "inner", "magnitude"}), (LINEAR,), form)


def _shared_faults(adapter: Adapter) -> Iterator[Finding]:
    rank = adapter.fields.rank
    for role, axis in ((A, 0), (B, 1)):
        stored = adapter.shared.get(role)
        if stored is None:
            want = "a factor for all modules"
            yield Finding(ERROR, "missing-tensor", role, want, "none")
            continue
        form = (rank, None) if axis == 0 else (None, rank)
        yield from targeted.form_faults(stored, form)
