"""What a `peft_type` is: one row here and one object that says how its config and keys are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from adapterkit.hub.findings import Finding
from adapterkit.hub.formats.config import ConfigReader


def _none(config: Mapping[str, Any]) -> list[Finding]:
    return []


@dataclass(frozen=True)
class PeftType:
    """kind: its row in `kinds.KINDS`. endings: end of a key behind the module's path -> role.

    fields: (config, modules of the file) -> the kind's fields, with `replaced` among them; it is
    asked once without modules, as keys cannot be placed before it is known what is replaced.
    known: fields it reads; inert: fields that change nothing in a saved adapter; refused: those
    that change the result and are not applied -> why. refusals: what else the config asks for in
    vain. whole: keys that belong to no module, without their prefix -> role.
    """

    kind: str
    endings: Mapping[str, str]
    fields: Callable[[ConfigReader, Collection[str]], Any]
    known: frozenset[str]
    inert: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    refusals: Callable[[Mapping[str, Any]], list[Finding]] = _none
    whole: Mapping[str, str] = field(default_factory=dict)


PEFT_TYPES = {
    "LORA": "adapterkit.hub.formats.peft_lora:LORA",
    "TRAINABLE_TOKENS": "adapterkit.hub.formats.peft_tokens:TRAINABLE_TOKENS",
}
# Types that PEFT, or a fork of it, writes; those without a row above are refused by name.
OTHER_TYPES = frozenset(
    [
        "ADALORA",
        "ADAMSS",
        "ADAPTION_PROMPT",
        "BEFT",
        "BOFT",
        "BOTTLENECK",
        "C3A",
        "CARTRIDGE",
        "CPT",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "FROD",
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "IA3",
        "LILY",
        "LN_TUNING",
        "LOHA",
        "LOKR",
        "MISS",
        "MULTITASK_PROMPT_TUNING",
        "OFT",
        "OSF",
        "PEANUT",
        "POLY",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "PSOFT",
        "PVERA",
        "P_TUNING",
        "RANDLORA",
        "ROAD",
        "SHADOW",
        "SHIRA",
        "SUPERTUNING",
        "TINYLORA",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
        "XLORA",
    ]
)


def peft_type(name: str) -> PeftType:
    """The row of that name."""
    module, _, attribute = PEFT_TYPES[name].partition(":")
    found: PeftType = getattr(import_module(module), attribute)
    return found
