"""LoRA whose factor is a gate, y = W x + b + g(x) B A x.  Mao et al. 2022, arXiv:2110.07577.

g(x) is the mean over all positions of sigmoid(w x + c): one number for each row of the batch and
each matrix in the module; alpha / r plays no part.  adapters 1.3 `methods/lora.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from adapterkit.hub.fields import FusedLoraFields
from adapterkit.hub.kinds import replaced
from adapterkit.hub.kinds.base import Lowered, Site
from adapterkit.hub.kinds.fused_lora import ROLES, TYPES, FusedLora, block_diagonal
from adapterkit.hub.kinds.targeted import IN, Form, Rules, Tensors
from adapterkit.hub.primitives import GatedLowRank

if TYPE_CHECKING:
    from torch import Tensor


class GatedLora(FusedLora):
    def variant(self, fields: FusedLoraFields) -> str:
        return "gated LoRA"

    def rules(self, fields: FusedLoraFields) -> Rules:
        plain = super().rules(fields)

        def form(module: str, tensors: Tensors) -> Form:
            count = sum(fields.parts(module))
            return {**plain.form(module, tensors), "gate": (count, IN), "gate_bias": (count,)}

        return Rules(ROLES | {"gate", "gate_bias"}, TYPES, form)

    def lower(self, fields: FusedLoraFields, site: Site, p: Mapping[str, Tensor]) -> Lowered:
        yield from replaced.lower(fields.replaced, site, p)
        if "A" in p:
            name = site.module.name
            b = block_diagonal(p["B"], fields.parts(name))
            yield name, GatedLowRank(b, p["A"], p["gate"], p["gate_bias"])
