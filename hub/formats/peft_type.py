"""What a `peft_type` is: one row here and one object that says how its config and keys are read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from adapterkit.hub.findings import Finding
from adapterkit.hub.formats.config import ConfigReader
from adapterkit.hub.headers import Stored
from adapterkit.hub.matching import Targets


def _none(config: Mapping[str, Any]) -> list[Finding]:
    return []


def _always(config: Mapping[str, Any], keys: Collection[str]) -> bool:
    return True


def _nowhere(keys: Iterable[str], targets: Targets) -> dict[str, tuple[str, str]]:
    return {}


def _as_stored(role: str, stored: Stored) -> Stored:
    return stored


@dataclass(frozen=True)
class PeftType:
    """kind: its row in `kinds.KINDS`. endings: end of a key behind the module's path -> role.

    fields: (config, modules of the file) -> the kind's fields, with `replaced` among them; it is
    asked once without modules, as keys cannot be placed before it is known what is replaced.
    known: fields it reads; inert: fields that change nothing in a saved adapter; refused: those
    that change the result and are not applied -> why. refusals: what else the config asks for in
    vain. whole: keys that belong to no module, without their prefix -> role. places: keys whose
    place the config decides -> (module, role). shaped: (role, tensor) -> the tensor in the shape
    that the kind knows. claims: of a row in VARIANTS, whether a file with
    this config and these keys is one.
    """

    kind: str
    endings: Mapping[str, str]
    fields: Callable[[ConfigReader, Collection[str]], Any]
    known: frozenset[str]
    inert: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict)
    refusals: Callable[[Mapping[str, Any]], list[Finding]] = _none
    whole: Mapping[str, str] = field(default_factory=dict)
    places: Callable[[Iterable[str], Targets], dict[str, tuple[str, str]]] = _nowhere
    shaped: Callable[[str, Stored], Stored] = _as_stored
    claims: Callable[[Mapping[str, Any], Collection[str]], bool] = _always


PEFT_TYPES = {
    "IA3": "adapterkit.hub.formats.peft_ia3:IA3",
    "BOTTLENECK": "adapterkit.hub.formats.llm_adapters:BOTTLENECK",
    "LORA": "adapterkit.hub.formats.peft_lora:LORA",
    "OFT": "adapterkit.hub.formats.peft_oft:OFT",
    "BOFT": "adapterkit.hub.formats.peft_boft:BOFT",
    "ADALORA": "adapterkit.hub.formats.peft_adalora:ADALORA",
    "LOHA": "adapterkit.hub.formats.peft_products:LOHA",
    "LOKR": "adapterkit.hub.formats.peft_products:LOKR",
    "LN_TUNING": "adapterkit.hub.formats.peft_plain:LN_TUNING",
    "BEFT": "adapterkit.hub.formats.peft_plain:BEFT",
    "VERA": "adapterkit.hub.formats.peft_vera:VERA",
    "TRAINABLE_TOKENS": "adapterkit.hub.formats.peft_tokens:TRAINABLE_TOKENS",
    "PREFIX_TUNING": "adapterkit.hub.formats.peft_prompt:PREFIX_TUNING",
    "PROMPT_TUNING": "adapterkit.hub.formats.peft_prompt:PROMPT_TUNING",
    "P_TUNING": "adapterkit.hub.formats.peft_prompt:P_TUNING",
}
# What forks and old versions write under the name of another type.
VARIANTS = {
    "LORA": (
        "adapterkit.hub.formats.peft_moslora:MOSLORA",
        "adapterkit.hub.formats.peft_fused:FUSED",
    ),
}
# Types that PEFT, or a fork of it, writes; those without a row above are refused by name.
OTHER_TYPES = frozenset(
    [
        "ADAMSS",
        "ADAPTION_PROMPT",
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
        "LILY",
        "MISS",
        "MULTITASK_PROMPT_TUNING",
        "OSF",
        "PEANUT",
        "POLY",
        "PSOFT",
        "PVERA",
        "RANDLORA",
        "ROAD",
        "SHADOW",
        "SHIRA",
        "SUPERTUNING",
        "TINYLORA",
        "UNILORA",
        "VBLORA",
        "WAVEFT",
        "XLORA",
    ]
)


def peft_type(name: str, config: Mapping[str, Any], keys: Collection[str]) -> PeftType:
    """The row of that name, or of the variant that the config and the keys show."""
    variants = (_load(path) for path in VARIANTS.get(name, ()))
    return next((row for row in variants if row.claims(config, keys)), _load(PEFT_TYPES[name]))


def _load(path: str) -> PeftType:
    module, _, attribute = path.partition(":")
    found: PeftType = getattr(import_module(module), attribute)
    return found
