"""MoSLoRA as its authors' fork of peft 0.10 writes it: `peft_type` stays LORA.

Source: github.com/wutaiqiang/MoSLoRA, `subject_driven_generation/peft/tuners/lora/model.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from adapterkit.hub.fields import MosloraFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, WARNING, Finding
from adapterkit.hub.formats import peft_lora
from adapterkit.hub.formats.config import ConfigReader
from adapterkit.hub.formats.peft_lora import LORA
from adapterkit.hub.matching import Patterns, first_of

FLAG, PATTERN, ENDING = "lora_use_mixer", "lora_use_mixer_pattern", ".lora_AB.weight"


def claims(config: Mapping[str, Any], keys: Collection[str]) -> bool:
    """By the flag, a pattern that turns it on, or the tensors where the config lost the flag."""
    patterns = config.get(PATTERN)
    named = isinstance(patterns, dict) and any(patterns.values())
    return bool(config.get(FLAG)) or named or any(".lora_AB." in key for key in keys)


def read(reader: ConfigReader, names: Collection[str]) -> MosloraFields:
    mixer = reader.flag(FLAG) or reader.config.get(FLAG) is None
    mixers = reader.config.get(PATTERN) or {}
    if not isinstance(mixers, dict) or not all(isinstance(on, bool) for on in mixers.values()):
        reader.fault(PATTERN, "an object of pattern to true or false")
    plain = peft_lora.read(reader, ())
    ranks = reader.numbers_by_pattern("rank_pattern", integer=True)
    alphas = reader.numbers_by_pattern("alpha_pattern", integer=False)
    patterns = Patterns()
    keys = [(name, first_of([*ranks, *alphas], name, patterns, "rank_pattern")) for name in names]
    own = {name: key if key is not None else name for name, key in keys}
    return MosloraFields(
        rank=plain.rank,
        alpha=plain.alpha,
        ranks={name: ranks[key] for name, key in own.items() if key in ranks},
        alphas={name: alphas[key] for name, key in own.items() if key in alphas},
        rslora=plain.rslora,
        dora=plain.dora,
        lora_bias=plain.lora_bias,
        replaced=plain.replaced,
        mixer=mixer,
        mixers={name: mixers[key] for name, key in own.items() if key in mixers},
    )


def refusals(config: Mapping[str, Any]) -> list[Finding]:
    found = peft_lora.mutations(config)
    if config.get("use_dora"):
        why = "the fork that writes mixers leaves them out of its DoRA"
        found.append(Finding(ERROR, UNSUPPORTED, "use_dora", f"no use_dora with {FLAG}", why))
    if config.get("enable_lora"):
        why = "the fork that writes mixers leaves them out of fused layers"
        found.append(Finding(ERROR, UNSUPPORTED, "enable_lora", f"none with {FLAG}", why))
    if config.get(FLAG) is None:
        about = "no such field, but tensors of a mixer: they are applied"
        found.append(Finding(WARNING, "mixer-not-declared", FLAG, "true", about))
    return found


MOSLORA = replace(
    LORA,
    kind="moslora",
    endings={**LORA.endings, ENDING: "mixer"},
    fields=read,
    known=LORA.known | {FLAG, PATTERN},
    refusals=refusals,
    claims=claims,
)
