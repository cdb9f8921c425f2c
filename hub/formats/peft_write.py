"""A PEFT folder of what is known in canonical form.  peft 0.21 `utils/save_and_load.py`.

Keys and config fields are those that `formats.peft` reads; what is written is read back before
anybody gets it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.fields import LoraFields, ReplacedFields
from adapterkit.hub.findings import clean
from adapterkit.hub.formats.files import CONFIG
from adapterkit.hub.formats.peft import WEIGHTS
from adapterkit.hub.formats.peft_config import MAX_RANK
from adapterkit.hub.formats.peft_keys import PREFIX, ROOT
from adapterkit.hub.formats.peft_parameters import INNER, ORDER
from adapterkit.hub.formats.peft_prompt import PROMPT
from adapterkit.hub.formats.peft_type import PeftType, peft_type
from adapterkit.hub.formats.safetensors_write import Part, dump
from adapterkit.registry.errors import InvalidError

Place = tuple[str, str]
FUSED = ("experts_A", "experts_B")
# Since it, factors of a fused weight are those of its experts as linear layers.
RULES = "0.21.0"
FORKS = ("BOTTLENECK",)
PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
# Tasks for which PEFT adds the head to `modules_to_save`, whatever the config says.
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def files(config: Mapping[str, Any], parts: Mapping[Place, Part]) -> dict[str, bytes]:
    """Path -> content: the same bytes for the same adapter. parts: by (module, role).

    Raises InvalidError naming each tensor that PEFT's type has no key for.
    """
    if config["peft_type"] in PROMPTS:
        keys = {place: _prompt_key(place) for place in parts}
    else:
        keys = _keys(peft_type(str(config["peft_type"]), config, ()), parts.keys())
    return _files(config, {keys[place]: part for place, part in parts.items()})


def _files(config: Mapping[str, Any], tensors: Mapping[str, Part]) -> dict[str, bytes]:
    text = json.dumps(dict(config), indent=2, sort_keys=True)
    return {CONFIG: f"{text}\n".encode(), WEIGHTS[0]: dump(tensors)}


def _prompt_key(place: Place) -> str:
    """These types have one tensor of their own, and heads without the half of the prefix."""
    module, role = place
    return f"{ROOT}{module}.{role.removeprefix('replace.')}" if module else PROMPT


def _keys(row: PeftType, places: Collection[Place]) -> dict[Place, str]:
    endings: dict[str, str] = {}
    for ending, role in row.endings.items():  # the first is the one that PEFT writes today
        endings.setdefault(role, ending)
    whole = {role: key for key, role in row.whole.items()}
    own = {module for module, role in places if role in endings}
    found: dict[Place, str] = {}
    strange = []
    for module, role in places:
        if role in FUSED:
            found[module, role] = _fused_key(module, role, places)
        elif not module and role in whole:
            found[module, role] = ROOT + whole[role]
        elif role in endings:
            found[module, role] = f"{PREFIX}{module}{endings[role]}"
        elif ending := _replacing(role, module in own, (module, "tokens") in places):
            found[module, role] = f"{PREFIX}{module}{ending}"
        else:
            strange.append(f"{role} of {clean(module)}")
    if strange:
        shown = ", ".join(sorted(strange)[:20])
        raise InvalidError(f"PEFT's {row.kind} has no tensor for {shown}")
    return found


def _fused_key(module: str, role: str, places: Collection[Place]) -> str:
    """Parameters of one module are wrapped one around another, the first innermost."""
    path, _, parameter = module.rpartition(".")
    beside = {name.rpartition(".")[2] for name, other in places if other == role
              and name.rpartition(".")[0] == path}  # fmt: skip
    depth = sum(ORDER.index(each) > ORDER.index(parameter) for each in beside)
    return f"{PREFIX}{path}{INNER * depth}.lora_{role[-1]}.weight"


def _replacing(role: str, is_target: bool, has_tokens: bool) -> str:
    """The end of the key of a part that the adapter replaces, "" for no such part."""
    if role == "tokens":
        return ".token_adapter.trainable_tokens_delta"
    if role == "table":
        inside = ".token_adapter.base_layer" if has_tokens else ".base_layer" if is_target else ""
        return f"{inside}.weight"
    if role == "replace.bias" and is_target:
        return ".base_layer.bias"
    return f".{role.removeprefix('replace.')}" if role.startswith("replace.") else ""


def lora_config(
    adapter: Adapter, rank: int, modules: Collection[str], *, lora_bias: bool
) -> dict[str, Any]:
    """Of a plain LoRA of one rank with the scale 1, which needs no pattern and no rsLoRA to be
    right: alpha is the rank. modules: those that have factors."""
    fields = LoraFields(rank, rank, lora_bias=lora_bias, replaced=adapter.fields.replaced)
    return _common(adapter, modules, _factored(adapter)) | _lora(fields)


def _factored(adapter: Adapter) -> set[str]:
    """Modules for which the file has more than replaced parts."""
    return {module for module, role in adapter.tensors if module and not is_replacing(role)}


def is_replacing(role: str) -> bool:
    return role in ("tokens", "table") or role.startswith(("replace.", "wrapper."))


def _common(adapter: Adapter, modules: Collection[str], own: Collection[str]) -> dict[str, Any]:
    """What every type has. The targets stay as the config has them while they mean `modules`."""
    targets = adapter.targets
    names: Any = sorted(modules)
    found: dict[str, Any] = {}
    if (targets.modules or targets.parameters) and set(modules) == set(own):
        said = targets.modules or ()
        names = said if isinstance(said, str) else sorted(said)
        found["exclude_modules"] = _listed(targets.exclude)
        found["layers_to_transform"] = _listed(targets.layers)
        found["layers_pattern"] = _listed(targets.layers_pattern)
    if targets.parameters:
        found["target_parameters"] = _listed(targets.parameters)
        found["peft_version"] = RULES
    auto = adapter.config.get("auto_mapping")
    found |= {
        "auto_mapping": auto if isinstance(auto, dict) else None,
        "base_model_name_or_path": adapter.base_name,
        "revision": adapter.revision,
        "task_type": _task(adapter),
        "inference_mode": True,
        "target_modules": names,
        "modules_to_save": _listed(targets.saved),
    }
    if adapter.fields.replaced.bias != "none":
        found["bias"] = adapter.fields.replaced.bias
    return found | _tokens(adapter.fields.replaced)


def _task(adapter: Adapter) -> str | None:
    """None for a task whose head PEFT would look for in the file, and not find."""
    heads = any(role == "replace.weight" for _, role in adapter.tensors)
    return None if adapter.task in HEADED and not heads else adapter.task


def _tokens(fields: ReplacedFields) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if fields.tokens:
        rows = {module: list(indices) for module, indices in fields.tokens.items()}
        found["trainable_token_indices"] = rows[""] if list(rows) == [""] else rows
    if fields.tie:
        found["ensure_weight_tying"] = True
    return found


def _listed(value: Any) -> Any:
    return (list(value) or None) if isinstance(value, tuple) else value or None


def _lora(fields: LoraFields) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": fields.rank,
        "lora_alpha": number(fields.alpha),
        "lora_dropout": 0.0,
        "rank_pattern": dict(fields.ranks),
        "alpha_pattern": {name: number(alpha) for name, alpha in fields.alphas.items()},
        "use_rslora": fields.rslora,
        "use_dora": fields.dora,
        "lora_bias": fields.lora_bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


def written(adapter: Adapter) -> dict[str, bytes]:
    """What PEFT wrote, as PEFT writes it now: in safetensors, the adapter's name left out of keys.

    Raises InvalidError for what only a fork of PEFT reads."""
    name = str(adapter.config["peft_type"])
    if name in FORKS or peft_type(name, {}, ()).kind != adapter.kind:
        raise InvalidError(
            f"{clean(adapter.name)} is of the kind {adapter.kind}, which a fork of PEFT wrote and"
            " PEFT itself does not read, or reads as something else",
            hint="adapter convert makes a plain LoRA of it",
        )
    named = any(finding.code == "adapter-name-in-keys" for finding in adapter.findings)
    if named:
        parts = {place: Part.of(stored) for place, stored in adapter.tensors.items()}
        return files(adapter.config, parts)
    tensors = {stored.key: Part.of(stored) for stored in adapter.tensors.values()}
    return _files(adapter.config, tensors)


def config_of(
    adapter: Adapter, own: Mapping[str, Any], modules: Collection[str], task: str | None
) -> dict[str, Any]:
    """The fields of a type, and what all types have. modules: those that have tensors of it. task:
    of the model, without which PEFT does not put a prompt in front of it."""
    if own["peft_type"] in PROMPTS:
        found = {"task_type": task, "modules_to_save": _listed(adapter.targets.saved)}
        found |= {"base_model_name_or_path": adapter.base_name, "revision": adapter.revision}
        return found | {"inference_mode": True, **own}
    return {**_common(adapter, modules, ()), **own}


__all__ = [
    "MAX_RANK", "Part", "Place", "config_of", "files", "is_replacing", "lora_config", "number",
    "written",
]  # fmt: skip
