"""A PEFT folder of what is known in canonical form.  peft 0.21 `utils/save_and_load.py`.

Keys and config fields are those that `formats.peft` reads; what is written is read back before
anybody gets it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.fields import Ia3Fields, LoraFields, ReplacedFields
from adapterkit.hub.findings import clean
from adapterkit.hub.formats.files import CONFIG
from adapterkit.hub.formats.peft import WEIGHTS
from adapterkit.hub.formats.peft_config import MAX_RANK
from adapterkit.hub.formats.peft_keys import PREFIX, ROOT
from adapterkit.hub.formats.peft_type import PEFT_TYPES, PeftType, peft_type
from adapterkit.hub.formats.safetensors_write import Part, dump
from adapterkit.registry.errors import InvalidError

Place = tuple[str, str]
# Tasks for which PEFT adds the head to `modules_to_save`, whatever the config says.
HEADED = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def files(config: Mapping[str, Any], parts: Mapping[Place, Part]) -> dict[str, bytes]:
    """Path -> content: the same bytes for the same adapter. parts: by (module, role).

    Raises InvalidError naming each tensor that PEFT's type has no key for.
    """
    row = peft_type(str(config["peft_type"]), config, ())
    keys = _keys(row, parts.keys())
    text = json.dumps(dict(config), indent=2, sort_keys=True)
    weights = dump({keys[place]: part for place, part in parts.items()})
    return {CONFIG: f"{text}\n".encode(), WEIGHTS[0]: weights}


def _keys(row: PeftType, places: Collection[Place]) -> dict[Place, str]:
    endings: dict[str, str] = {}
    for ending, role in row.endings.items():  # the first is the one that PEFT writes today
        endings.setdefault(role, ending)
    whole = {role: key for key, role in row.whole.items()}
    own = {module for module, role in places if role in endings}
    found: dict[Place, str] = {}
    strange = []
    for module, role in places:
        if not module and role in whole:
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
    return _common(adapter, modules, _factored(adapter)) | _lora(fields, {})


def _factored(adapter: Adapter) -> set[str]:
    """Modules for which the file has more than replaced parts."""
    return {module for module, role in adapter.tensors if module and not is_replacing(role)}


def is_replacing(role: str) -> bool:
    return role in ("tokens", "table") or role.startswith(("replace.", "wrapper."))


def config_of(adapter: Adapter) -> dict[str, Any]:
    """The config with which PEFT reads this adapter. Raises InvalidError where PEFT has no type for
    its kind."""
    if adapter.format == "peft" and "peft_type" in adapter.config:
        return dict(adapter.config)
    make = CONFIGS.get(adapter.kind)
    if make is None:
        known = ", ".join(sorted({*PEFT_TYPES, *map(str.upper, CONFIGS)}))
        raise InvalidError(
            f"{clean(adapter.name)} is of the kind {adapter.kind}, for which PEFT has no type",
            hint=f"PEFT has {known}; adapter convert may make a LoRA of it",
        )
    own = _factored(adapter)
    return _common(adapter, own, own) | make(adapter.fields, _shapes(adapter))


def _shapes(adapter: Adapter) -> dict[Place, tuple[int, ...]]:
    return {place: stored.shape for place, stored in adapter.tensors.items()}


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
    auto = adapter.config.get("auto_mapping")
    found |= {
        "auto_mapping": auto if isinstance(auto, dict) else None,
        "base_model_name_or_path": adapter.base_name,
        "revision": adapter.revision,
        "task_type": _task(adapter),
        "inference_mode": True,
        "target_modules": names,
        "modules_to_save": _listed(targets.saved),
        "bias": adapter.fields.replaced.bias,
    }
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


def _lora(fields: LoraFields, shapes: Mapping[Place, tuple[int, ...]]) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "r": fields.rank,
        "lora_alpha": _number(fields.alpha),
        "lora_dropout": 0.0,
        "rank_pattern": dict(fields.ranks),
        "alpha_pattern": {name: _number(alpha) for name, alpha in fields.alphas.items()},
        "use_rslora": fields.rslora,
        "use_dora": fields.dora,
        "lora_bias": fields.lora_bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _ia3(fields: Ia3Fields, shapes: Mapping[Place, tuple[int, ...]]) -> dict[str, Any]:
    inputs = sorted(m for (m, role), shape in shapes.items() if role == "gain" and shape[0] == 1)
    said = fields.feedforward
    named = list(said) if isinstance(said, tuple) else said
    return {"peft_type": "IA3", "feedforward_modules": inputs if named is None else named}


def _number(value: float) -> float:
    return int(value) if float(value).is_integer() else value


Make = Callable[[Any, Mapping[Place, tuple[int, ...]]], dict[str, Any]]
# kind -> its fields of PEFT's config, for adapters that other tools wrote
CONFIGS: dict[str, Make] = {"lora": _lora, "ia3": _ia3}


def written(adapter: Adapter) -> dict[str, bytes]:
    """The adapter as PEFT reads it, its tensors as they are, without what PEFT's wrappers repeat of
    saved modules. Raises InvalidError where PEFT has no type for it."""
    kept = {place: s for place, s in adapter.tensors.items() if not place[1].startswith("wrapper.")}
    return files(config_of(adapter), {place: Part.of(stored) for place, stored in kept.items()})


__all__ = ["MAX_RANK", "Part", "Place", "files", "is_replacing", "lora_config", "written"]
