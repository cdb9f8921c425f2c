"""Adapter kinds: one file and one row each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from adapterkit.registry.errors import NotFoundError

if TYPE_CHECKING:
    from adapterkit.hub.adapter import Adapter
    from adapterkit.hub.bases.base import Base
    from adapterkit.hub.kinds.base import Kind, Schema

KINDS = {
    "union": "adapterkit.hub.kinds.union:Union",
    "reft": "adapterkit.hub.kinds.reft:Reft",
    "fused_ia3": "adapterkit.hub.kinds.fused_ia3:FusedIa3",
    "gated_lora": "adapterkit.hub.kinds.gated_lora:GatedLora",
    "fused_lora": "adapterkit.hub.kinds.fused_lora:FusedLora",
    "output_dora": "adapterkit.hub.kinds.output_dora:OutputDora",
    "square_vera": "adapterkit.hub.kinds.square_vera:SquareVera",
    "ia3": "adapterkit.hub.kinds.ia3:Ia3",
    "lora": "adapterkit.hub.kinds.lora:Lora",
    "moslora": "adapterkit.hub.kinds.moslora:Moslora",
    "oft": "adapterkit.hub.kinds.oft:Oft",
    "adalora": "adapterkit.hub.kinds.adalora:Adalora",
    "beft": "adapterkit.hub.kinds.beft:Beft",
    "bitfit": "adapterkit.hub.kinds.bitfit:Bitfit",
    "boft": "adapterkit.hub.kinds.boft:Boft",
    "loha": "adapterkit.hub.kinds.loha:Loha",
    "lokr": "adapterkit.hub.kinds.lokr:Lokr",
    "ln_tuning": "adapterkit.hub.kinds.ln_tuning:LnTuning",
    "vera": "adapterkit.hub.kinds.vera:Vera",
    "bottleneck": "adapterkit.hub.kinds.bottleneck:Bottleneck",
    "compacter": "adapterkit.hub.kinds.compacter:Compacter",
    "fusion": "adapterkit.hub.kinds.fusion:Fusion",
    "llm_bottleneck": "adapterkit.hub.kinds.llm_bottleneck:LlmBottleneck",
    "prefix": "adapterkit.hub.kinds.prefix:Prefix",
    "prompt": "adapterkit.hub.kinds.prompt:Prompt",
    "trainable_tokens": "adapterkit.hub.kinds.trainable_tokens:TrainableTokens",
}


def kind(name: str) -> Kind:
    """The kind of that name. Raises NotFoundError."""
    if name not in KINDS:
        raise NotFoundError(f"{name} is not a kind of adapter known here")
    module, _, attribute = KINDS[name].partition(":")
    found: Kind = getattr(import_module(module), attribute)()
    return found


def schema_of(adapter: Adapter, base: Base) -> Schema:
    """The tensors the adapter should hold on this base."""
    from adapterkit.hub.kinds.base import Based

    made = kind(adapter.kind)
    if isinstance(made, Based):
        return made.schema_on(adapter, base)
    return made.schema(adapter, base.modules)
