"""Adapters that other tools wrote, in PEFT's words: from their primitives, where one type of PEFT
has exactly these.  peft 0.21 `tuners/*/config.py`, `peft_model.py` (get_prompt)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterkit.hub.findings import clean
from adapterkit.hub.formats.peft_write import Place, number
from adapterkit.hub.primitives import (
    LowRank,
    OutputGain,
    PrefixKV,
    Primitive,
    Replace,
    VirtualTokens,
)
from adapterkit.registry.errors import InvalidError

if TYPE_CHECKING:
    from torch import Tensor

    from adapterkit.hub.bases.base import Base

# (module or "", its primitives) of the whole adapter, without replaced parts
Made = Mapping[str, Sequence[Primitive]]
Written = tuple[dict[str, Any], dict[Place, "Tensor"]]


def expressed(name: str, made: Made, base: Base | None) -> Written:
    """(fields of the config, tensors by place). Raises InvalidError where PEFT has no such type."""
    acting = {
        module: [p for p in each if not isinstance(p, Replace)] for module, each in made.items()
    }
    acting = {module: each for module, each in acting.items() if each}
    kinds = {type(primitive) for each in acting.values() for primitive in each}
    single = all(len(each) == 1 for each in acting.values())
    if len(kinds) != 1 or not single:
        shown = ", ".join(sorted(kind.__name__ for kind in kinds)) or "replaced parts alone"
        raise InvalidError(f"{clean(name)}: no type of PEFT has {shown}", hint=HINT)
    (kind,) = kinds
    write = WRITERS.get(kind)
    if write is None:
        raise InvalidError(f"{clean(name)}: no type of PEFT has {kind.__name__}", hint=HINT)
    return write(name, {module: each[0] for module, each in acting.items()}, base)


HINT = "adapter convert makes a LoRA of what is a change of weights"


def _lora(name: str, made: Mapping[str, Any], base: Base | None) -> Written:
    odd = [m for m, p in made.items() if p.out_scale is not None or p.B.ndim != 2]
    if odd:
        raise InvalidError(f"{clean(name)}: {clean(odd[0])} is no plain LoRA", hint=HINT)
    tensors, ranks, alphas = {}, {}, {}
    for module, p in made.items():
        a = p.A if p.rank_scale is None else p.rank_scale[:, None] * p.A
        tensors[module, "A"], tensors[module, "B"] = a, p.B
        ranks[module], alphas[module] = p.A.shape[0], p.scale * p.A.shape[0]
    rank, alpha = (max(each.values(), key=list(each.values()).count) for each in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": number(alpha),
        "lora_dropout": 0.0,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: number(a) for m, a in alphas.items() if a != alpha},
        "use_rslora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }, tensors  # fmt: skip


def _ia3(name: str, made: Mapping[str, Any], base: Base | None) -> Written:
    tensors = {(module, "gain"): p.l[:, None] for module, p in made.items()}
    return {"peft_type": "IA3", "feedforward_modules": [], "fan_in_fan_out": False}, tensors


def _prefix(name: str, made: Mapping[str, Any], base: Base | None) -> Written:
    import torch

    _require_single_stack(name, base)
    every = list(made.values())
    if any(p.gate is not None for p in every) or not all(p.shifts for p in every):
        raise InvalidError(
            f"{clean(name)}: PEFT has no prefixes with gates, nor such that leave positions as they"
            " are"
        )
    columns = [part for p in every for part in (p.k, p.v)]
    length, width = every[0].k.shape
    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": length,
        "num_layers": len(every),
        "token_dim": width,
        "num_attention_heads": every[0].heads,
        "num_transformer_submodules": 1,
    }
    return config, {("", "self.prefix"): torch.cat(columns, dim=1)}


def _prompt(name: str, made: Mapping[str, Any], base: Base | None) -> Written:
    _require_single_stack(name, base)
    (tokens,) = made.values()
    if tokens.place != "front":
        raise InvalidError(f"{clean(name)}: PEFT puts virtual tokens in front, not {tokens.place}")
    length, width = tokens.e.shape
    config = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": length,
        "token_dim": width,
        "num_transformer_submodules": 1,
    }
    return config, {("", "rows"): tokens.e}


def _require_single_stack(name: str, base: Base | None) -> None:
    if base is None or base.config.get("is_encoder_decoder"):
        raise InvalidError(f"{clean(name)}: only on a model of one stack is it written for PEFT")


WRITERS: dict[type, Callable[[str, Mapping[str, Any], Base | None], Written]] = {
    LowRank: _lora,
    OutputGain: _ia3,
    PrefixKV: _prefix,
    VirtualTokens: _prompt,
}
