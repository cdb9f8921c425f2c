"""MoSLoRA, W' = W + s B M A with a mixer M (r, r).  Wu et al. 2024, arXiv:2406.11909."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.bases.base import EMBEDDING, Module
from adapterkit.hub.fields import MosloraFields
from adapterkit.hub.findings import ERROR, Finding
from adapterkit.hub.headers import Stored
from adapterkit.hub.kinds.base import Expected, Summary
from adapterkit.hub.kinds.lora import Lora

if TYPE_CHECKING:
    from torch import Tensor

MIXER = "mixer"


class Moslora(Lora):
    def summary(self, adapter: Adapter) -> Summary:
        plain = super().summary(adapter)
        words = [word for word in plain.variant.split("+") if word != "LoRA"]
        return replace(plain, variant="+".join([*words, "MoSLoRA"]))

    def problems(self, adapter: Adapter) -> list[Finding]:
        found = super().problems(adapter)
        for module, tensors in adapter.modules.items():
            found += _mixer(adapter.fields, module, tensors)
        return found

    def expected(self, fields: Any, module: Module) -> dict[tuple[str, str], Expected]:
        tensors = super().expected(fields, module)
        if fields.has_mixer(module.name) and module.type != EMBEDDING:
            rank = fields.rank_of(module.name)
            tensors[module.name, MIXER] = Expected((rank, rank))
        return tensors

    def factors(self, module: Module, p: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """The mixer is folded into B, so that a rank and a scale mean what they do in LoRA."""
        pair = super().factors(module, p)
        if pair is None or MIXER not in p:
            return pair
        a, b = pair
        return a, b @ p[MIXER]


def _mixer(fields: MosloraFields, module: str, tensors: Mapping[str, Stored]) -> list[Finding]:
    wanted, held = fields.has_mixer(module), tensors.get(MIXER)
    rank = fields.rank_of(module)
    if held is None:
        if not wanted or "A" not in tensors:
            return []
        about = "none, though the config puts a mixer there"
        return [Finding(ERROR, "missing-tensor", module, "a mixer between A and B", about)]
    if not wanted:
        about = "a mixer, though the config says that there is none"
        return [Finding(ERROR, "unexpected-tensor", held.key, "no mixer", about)]
    if "A" not in tensors:
        about = "a mixer without its factors"
        return [Finding(ERROR, "missing-tensor", module, "factors A and B", about)]
    if held.shape != (rank, rank):
        want = f"a square mixer [{rank}, {rank}]"
        return [Finding(ERROR, "shape-mismatch", held.key, want, f"shape {list(held.shape)}")]
    return []
