"""AdapterHub's `lora`: LoRA, its DoRA, (IA)3 and VeRA, told apart by fields.  adapters 1.3
`configuration/adapter_config.py`, `methods/lora.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packaging.version import Version

from adapterkit.hub.fields import FusedLoraFields
from adapterkit.hub.findings import WARNING, Finding
from adapterkit.hub.formats.adapterhub_places import FUSED, matrices, targets
from adapterkit.hub.formats.adapterhub_type import Architecture, Key, Outer, Paths, Place
from adapterkit.hub.formats.config import ConfigReader, unsupported
from adapterkit.hub.formats.peft_config import MAX_RANK

MODES = ("add", "scale")
# Before this version the library ignored alpha in a forward: with it set to r they act as trained.
SCALED = Version("1.1.0")
ROLES = {
    "lora_A": "A",
    "lora_B": "B",
    "m.weight": "magnitude",
    "vera_B": "outer",
    "vera_D": "inner",
    "gate.weight": "gate",
    "gate.bias": "gate_bias",
}
SHARED = {"lora_A": "shared_A", "lora_B": "shared_B"}


def kind(config: Mapping[str, Any], outer: Outer) -> str:
    if config.get("composition_mode") == "scale":
        return "fused_ia3"
    if _is_vera(config):
        return "square_vera"
    if config.get("use_dora"):
        return "output_dora"
    if config.get("use_gating"):
        return "gated_lora"
    return "fused_lora" if outer.model_type in FUSED else "lora"


def _is_vera(config: Mapping[str, Any]) -> bool:
    return any(isinstance(config.get(name), float) for name in ("vera_b", "vera_d"))


def place(key: Key) -> Place | None:
    if key.holder == "shared_parameters" and "." not in key.path and key.rest in SHARED:
        return "", SHARED[key.rest]
    role = ROLES.get(key.rest) if key.holder == "loras" else None
    return None if role is None or not key.path else (key.path, role)


def read(reader: ConfigReader, outer: Outer, paths: Paths) -> FusedLoraFields:
    rank, alpha = reader.count("r", 8, MAX_RANK), reader.number("alpha", 8)
    reader.choice("composition_mode", "add", MODES)
    for name in ("use_dora", "use_gating"):
        reader.flag(name)
    old = outer.version is not None and outer.version < SCALED
    enabled = tuple(part in matrices(reader) for part in "qkv")
    fused = FUSED.get(outer.model_type) if any(enabled) else None
    return FusedLoraFields(
        rank=rank,
        alpha=rank if old else alpha,
        dora=reader.flag("use_dora"),
        fused={fused: enabled} if fused else {},
    )


def refusals(config: Mapping[str, Any], outer: Outer) -> list[Finding]:
    scales, found = config.get("composition_mode") == "scale", []
    if scales and config.get("r") != 1:
        found.append(unsupported("r", "composition_mode scale has one vector for each module"))
    for other in ("use_gating", "use_dora", "vera_b", "vera_d"):
        if scales and config.get(other):
            found.append(unsupported(other, "composition_mode scale takes none"))
    if config.get("use_gating") and (config.get("use_dora") or _is_vera(config)):
        found.append(unsupported("use_gating", "a gate around DoRA or VeRA"))
    if _mended(config, outer):
        about = f"alpha {config['alpha']}, which adapters before {SCALED} ignored: alpha = r"
        found.append(Finding(WARNING, "alpha-ignored", "alpha", f"r = {config['r']}", about))
    return found


def _mended(config: Mapping[str, Any], outer: Outer) -> bool:
    old = outer.version is not None and outer.version < SCALED
    return old and "alpha" in config and config["alpha"] != config.get("r")


LORA = Architecture(
    kind=kind,
    place=place,
    fields=read,
    targets=targets,
    known=frozenset(
        ["r", "alpha", "composition_mode", "use_dora", "use_gating", "vera_b", "vera_d",
         "attn_matrices", "selfattn_lora", "intermediate_lora", "output_lora", "leave_out"]
    ),
    inert=frozenset(["dropout", "dtype", "init_weights", "init_weights_seed"]),
    refusals=refusals,
)  # fmt: skip
