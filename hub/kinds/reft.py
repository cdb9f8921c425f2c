"""ReFT, h' = h + R^T (act(W h + b) - R h) at a few tokens behind each layer.

Wu et al. 2024, arXiv:2404.03592: R has orthonormal rows (LoReFT), or any (NoReFT); DiReFT does not
subtract R h.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import Base, Module
from adapterkit.hub.bases.places import EMBEDDINGS, places
from adapterkit.hub.fields import ReftFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding
from adapterkit.hub.kinds import placed, replaced
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.placed import Form, Size
from adapterkit.hub.primitives import Intervention

if TYPE_CHECKING:
    from torch import Tensor

FIRST, LAST = "first", "last"


class Reft:
    def summary(self, adapter: Adapter) -> Summary:
        fields: ReftFields = adapter.fields
        name = "LoReFT" if fields.orthogonal else "NoReFT" if fields.subtracts else "DiReFT"
        return Summary(name, (fields.rank,) * len(placed.own(adapter)))

    def problems(self, adapter: Adapter) -> list[Finding]:
        fields: ReftFields = adapter.fields
        found = placed.faults(adapter.shared, "", {})
        held = placed.own(adapter)
        for path, tensors in held.items():
            found += placed.faults(tensors, path, _form(fields, None))
        if not held:
            found.append(Finding(ERROR, "no-factors", "the weights", "interventions", "none"))
        return found + placed.problems(adapter)

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        return Schema({})  # which layers there are depends on the family: `schema_on`

    def schema_on(self, adapter: Adapter, base: Base) -> Schema:
        fields: ReftFields = adapter.fields
        findings = placed.unplaced(base)
        if base.config.get("is_encoder_decoder"):
            about = "two stacks, whose tokens are not the same"
            findings.append(Finding(ERROR, UNSUPPORTED, "model_type", "one stack of layers", about))
        tensors: dict[tuple[str, str], Expected] = {}
        for found in places(base).values():
            wanted = fields.layers is None or found.number in fields.layers
            if found.name != EMBEDDINGS and wanted:
                tensors |= placed.expected(found.layer, _form(fields, found.width))
        rest = replaced.schema(adapter, fields.replaced, base.modules, ())
        return Schema(rest.tensors | tensors, (*findings, *rest.findings))

    def lower(self, fields: Any, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)

    def lower_whole(
        self, fields: ReftFields, base: Base, p: Mapping[tuple[str, str], Tensor]
    ) -> Lowered:
        for layer in dict.fromkeys(path for path, _ in p):
            for unit, (first, last) in _units(fields).items():
                held = {
                    r.partition(".")[2]: p[x, r] for x, r in p if x == layer and r.startswith(unit)
                }
                projection = held.get("projection")
                if projection is None:
                    projection = orthonormal(held["original"], held["basis"])
                yield (
                    layer,
                    Intervention(
                        held["source"],
                        held["source_bias"],
                        projection,
                        first=first,
                        last=last,
                        act=fields.act,
                        subtracts=fields.subtracts,
                    ),
                )


def orthonormal(original: Tensor, basis: Tensor) -> Tensor:
    """R (r, h) from what torch keeps of it: a lower triangle (r, h), and the basis (h, h) that its
    rotation starts from.  torch 2.13 `nn/utils/parametrizations.py`, _Orthogonal."""
    import torch

    if original.shape[0] == original.shape[1]:
        whole = original.tril()
        return basis @ torch.matrix_exp(whole - whole.mT)
    x = original.mT
    lower = x.tril(diagonal=-1)
    tau = 2 / (1 + (lower * lower).sum(dim=-2))
    q = torch.linalg.householder_product(lower, tau) * x.diagonal().int()
    found: Tensor = (basis @ q).mT
    return found


def _units(fields: ReftFields) -> dict[str, tuple[int, int]]:
    """Which tensors act on how many tokens at the start, and at the end."""
    if fields.tied:
        return {FIRST: (fields.first, fields.last)}
    return {FIRST: (fields.first, 0), LAST: (0, fields.last)}


def _form(fields: ReftFields, width: Size) -> Form:
    rank = fields.rank
    form: dict[str, tuple[Size, ...]] = {}
    for unit in _units(fields):
        form |= {f"{unit}.source": (rank, width), f"{unit}.source_bias": (rank,)}
        if fields.orthogonal:
            form |= {f"{unit}.original": (rank, width), f"{unit}.basis": (width, width)}
        else:
            form[f"{unit}.projection"] = (rank, width)
    return form
