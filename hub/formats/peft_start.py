"""The adapter as it was before training, saved in a folder beside the trained one.

Inits that change the base cannot be had again where they depend on data or on chance; with the
start at hand they are plain LoRA, W + s (B A - B0 A0), as PEFT converts them
(peft 0.21 `tuners/lora/model.py`, subtract_mutated_init).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.fields import LoraFields, ReplacedFields
from adapterkit.hub.findings import ERROR, Finding, clean
from adapterkit.hub.formats.files import CONFIG, read_weights
from adapterkit.hub.formats.peft_keys import read_keys
from adapterkit.hub.formats.peft_lora import LORA, MUTATING
from adapterkit.hub.sources import Folder, read_object
from adapterkit.registry.errors import DamagedError

# `pissa_init`, `corda_init`: as PEFT's examples call it
PLACE = re.compile(r"([^/]*init[^/]*)/adapter_model\.(?:safetensors|bin)")
FIELD = "init_lora_weights"
ROLES = {"A": "start_A", "B": "start_B"}
# What has to be as in the trained adapter, and what cannot be combined with a start.
SAME = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
CLASHING = ("use_dora", "lora_bias", "target_parameters")


def completed(adapter: Adapter, folder: Folder) -> Adapter:
    """The adapter with its start, if it needs one and it is there. Raises DamagedError if several
    are."""
    init = adapter.config.get(FIELD)
    found = [match for path in folder.files if (match := PLACE.fullmatch(path))]
    needs = isinstance(init, str) and init.lower().startswith(MUTATING)
    if not needs or not found or not _is_plain(adapter):
        return adapter
    if len(found) > 1:
        shown = ", ".join(clean(match[0]) for match in found)
        raise DamagedError(f"{clean(folder.name)} has several starts: {shown}")
    path, config = found[0][0], f"{found[0][1]}/{CONFIG}"
    held = read_weights(folder, path).tensors
    keys = read_keys(held, LORA, ReplacedFields(), adapter.targets)
    tensors = {}
    findings = [finding for finding in adapter.findings if finding.tensor != FIELD]
    findings += [finding for finding in keys.findings if finding.severity == ERROR]
    for key, (module, role) in keys.places.items():
        stored = replace(held[key], key=f"{path}: {key}")  # the trained one has the same key
        if role in ROLES:
            tensors[module, ROLES[role]] = stored
        else:
            findings.append(Finding(ERROR, "unexpected-tensor", stored.key, "A or B", role))
    findings += _other(adapter.config, read_object(folder.file(config), clean(config)), config)
    return replace(
        adapter,
        fields=replace(adapter.fields, start="given"),
        tensors={**adapter.tensors, **tensors},
        findings=tuple(findings),
        files={**adapter.files, path: "weights", config: "config"},
    )


def _is_plain(adapter: Adapter) -> bool:
    is_lora = adapter.kind == LORA.kind and isinstance(adapter.fields, LoraFields)
    return is_lora and not any(adapter.config.get(field) for field in CLASHING)


def _other(mine: Mapping[str, Any], start: Mapping[str, Any], name: str) -> list[Finding]:
    return [
        Finding(ERROR, "other-start", f"{name}: {field}", repr(mine.get(field)), found)
        for field in SAME
        if (start.get(field) or None) != (mine.get(field) or None)
        for found in [clean(repr(start.get(field)), 80)]
    ]
