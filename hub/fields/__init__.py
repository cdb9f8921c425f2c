"""What the config of each kind means, in canonical form: plain data, every value checked."""

from __future__ import annotations

from adapterkit.hub.fields.layers import (
    BottleneckFields,
    FusionFields,
    LlmBottleneckFields,
    Mixing,
    PhmFields,
    PrefixFields,
    PromptFields,
    ReftFields,
    UnionFields,
    UnionPart,
    Wiring,
)
from adapterkit.hub.fields.modules import (
    AdaloraFields,
    BitfitFields,
    BoftFields,
    FusedLoraFields,
    Ia3Fields,
    LoraFields,
    MosloraFields,
    OftFields,
    PlainFields,
    ProductFields,
    TokensFields,
    VeraFields,
)
from adapterkit.hub.fields.replaced import (
    HEAD,
    HeadFields,
    ReplacedFields,
    Seat,
)

__all__ = [
    "AdaloraFields",
    "BitfitFields",
    "BoftFields",
    "BottleneckFields",
    "FusedLoraFields",
    "FusionFields",
    "HEAD",
    "HeadFields",
    "Ia3Fields",
    "LlmBottleneckFields",
    "LoraFields",
    "Mixing",
    "MosloraFields",
    "OftFields",
    "PhmFields",
    "PlainFields",
    "PrefixFields",
    "ProductFields",
    "PromptFields",
    "ReftFields",
    "ReplacedFields",
    "Seat",
    "TokensFields",
    "UnionFields",
    "UnionPart",
    "VeraFields",
    "Wiring",
]
