"""`enable_lora` of PEFT 0.2 and 0.3: LoRA on modules that are several matrices in one.

Source: peft 0.3 `tuners/lora.py` (MergedLinear), after loralib's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from adapterkit.hub.fields import FusedLoraFields
from adapterkit.hub.findings import Finding
from adapterkit.hub.formats import peft_lora
from adapterkit.hub.formats.config import ConfigReader, unsupported
from adapterkit.hub.formats.peft_lora import LORA
from adapterkit.hub.headers import Stored

FIELD = "enable_lora"
# PEFT's convolution has two groups, whatever is enabled.
GROUPS = 2


def claims(config: Mapping[str, Any], keys: Collection[str]) -> bool:
    return bool(config.get(FIELD)) and not config.get("lora_use_mixer")


def read(reader: ConfigReader, names: Collection[str]) -> FusedLoraFields:
    enabled = reader.config.get(FIELD)
    if not isinstance(enabled, list) or not all(isinstance(on, bool) for on in enabled):
        reader.fault(FIELD, "a list of true and false")
        enabled = []
    plain = peft_lora.read(reader, names)
    ends = {name.rpartition(".")[2] for name in names}
    return FusedLoraFields(**vars(plain), fused={end: tuple(enabled) for end in ends})


def refusals(config: Mapping[str, Any]) -> list[Finding]:
    found = peft_lora.mutations(config)
    if sum(map(bool, config[FIELD])) != GROUPS:
        found.append(unsupported(FIELD, "PEFT mixes them where others than two are enabled"))
    return found


def flat(role: str, stored: Stored) -> Stored:
    """B is the weight of a convolution over one position."""
    if role == "B" and len(stored.shape) == 3 and stored.shape[2] == 1:
        return replace(stored, shape=stored.shape[:2])
    return stored


FUSED = replace(
    LORA,
    kind="fused_lora",
    endings={".lora_A.weight": "A", ".lora_B.weight": "B"},
    fields=read,
    refusals=refusals,
    shaped=flat,
    claims=claims,
)
