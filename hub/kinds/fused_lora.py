"""LoRA on modules that may be several matrices in one, W' = W + s B A.

In such a module, as GPT-2's of query, key and value, some of the matrices have factors of rank r:
A holds those of the k that do one below the other, (k r, in), and B (k out / n, r), n being all.
It is exact as a LoRA of rank k r with a block-diagonal B.  loralib `MergedLinear`; adapters 1.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import CONV1D, LINEAR, Module
from adapterkit.hub.fields import FusedLoraFields
from adapterkit.hub.findings import Finding
from adapterkit.hub.kinds import replaced, targeted
from adapterkit.hub.kinds.base import Expected, Lowered, Schema, Site, Summary
from adapterkit.hub.kinds.targeted import IN, OUT, Form, Rules, Tensors
from adapterkit.hub.primitives import LowRank

if TYPE_CHECKING:
    from torch import Tensor

ROLES, TYPES = frozenset({"A", "B"}), (LINEAR, CONV1D)


class FusedLora:
    def summary(self, adapter: Adapter) -> Summary:
        fields: FusedLoraFields = adapter.fields
        names = [name for name, held in adapter.modules.items() if "A" in held]
        ranks = tuple(fields.rank_of(n) * sum(fields.parts(n)) for n in names)
        alphas = {fields.alphas.get(name, fields.alpha) for name in names}
        return Summary(self.variant(fields), ranks, tuple(sorted(alphas)))

    def variant(self, fields: FusedLoraFields) -> str:
        return "LoRA"

    def rules(self, fields: FusedLoraFields) -> Rules:
        def form(module: str, tensors: Tensors) -> Form:
            parts, rank = fields.parts(module), fields.rank_of(module)
            size = OUT if all(parts) else None
            return {"A": (sum(parts) * rank, IN), "B": (size, rank)}

        return Rules(ROLES, TYPES, form)

    def problems(self, adapter: Adapter) -> list[Finding]:
        return targeted.problems(adapter, self.rules(adapter.fields))

    def schema(self, adapter: Adapter, modules: Mapping[str, Module]) -> Schema:
        fields: FusedLoraFields = adapter.fields
        found = targeted.schema(adapter, modules, self.rules(fields))
        sized = {
            (name, role): Expected(
                (rows_of(fields.parts(name), modules[name].n_out), *shape.shape[1:])
            )
            for (name, role), shape in found.tensors.items()
            if role == "B"
        }
        return replace(found, tensors=found.tensors | sized)

    def lower(self, fields: FusedLoraFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        if "A" in p:
            name = site.module.name
            b = block_diagonal(p["B"], fields.parts(name))
            yield name, LowRank(b, p["A"], fields.scaling(name))


def rows_of(parts: tuple[bool, ...], n_out: int) -> int:
    """Outputs of the matrices that have factors."""
    return n_out // len(parts) * sum(parts)


def rows_in(parts: tuple[bool, ...], height: int) -> list[int]:
    """For each output of the whole module, its row in what holds the parts alone; 0 for the rows of
    a part that is not there."""
    starts = [sum(parts[:at]) * height if on else None for at, on in enumerate(parts)]
    return [0 if start is None else start + row for start in starts for row in range(height)]


def block_diagonal(b: Tensor, parts: tuple[bool, ...]) -> Tensor:
    """B (out, k r) of the whole module, from that of its parts, (k out / n, r)."""
    if len(parts) == 1:
        return b
    count, rank = sum(parts), b.shape[1]
    height = b.shape[0] // count
    whole = b[rows_in(parts, height)][:, list(range(rank)) * count]
    for at, enabled in enumerate(parts):
        rows, own = slice(at * height, (at + 1) * height), sum(parts[:at])
        for group in range(count):
            if not enabled or group != own:
                whole[rows, group * rank : (group + 1) * rank] = 0
    return whole
