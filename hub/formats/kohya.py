"""kohya-ss and LyCORIS: LoRA of a text model, one file, module paths with "_" in place of dots.

Source: kohya-ss/sd-scripts `networks/lora.py`. Image models, which most such files are of, are
refused by name.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Mapping
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.fields import LoraFields
from adapterkit.hub.findings import ERROR, Finding, clean
from adapterkit.hub.formats.config import MAX_NUMBER, is_number
from adapterkit.hub.formats.files import (
    LIKELY,
    Claim,
    Weights,
    bare_weights,
    required_weights,
    rest_of_file,
)
from adapterkit.hub.headers import Stored
from adapterkit.hub.matching import Targets
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import DamagedError, NotFoundError

ROLES = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}
# What stands in front of the path: the text encoder, the first to third of several, LyCORIS.
PREFIX = re.compile(r"(lora_te[123]?|lycoris)_")
# Names with an underscore inside; every other underscore was a dot.
WORDS = (
    "text_model", "language_model", "lm_head", "self_attn", "self_attention", "cross_attn",
    "encoder_attn", "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "gate_proj",
    "up_proj", "down_proj", "gate_up_proj", "c_attn", "c_proj", "c_fc", "q_attn", "in_proj",
    "fc_in", "fc_out", "wi_0", "wi_1", "embed_tokens", "embed_positions", "token_embedding",
    "position_embedding", "word_embeddings", "query_key_value", "dense_h_to_4h", "dense_4h_to_h",
    "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "q_lin", "k_lin", "v_lin",
    "out_lin", "vocab_projector", "linear_1", "linear_2", "text_projection",
)  # fmt: skip
WORD = re.compile("(?<![^_])(?:" + "|".join(sorted(WORDS, key=len, reverse=True)) + ")(?![^_])")
ALPHAS = {"F64": "<d", "F32": "<f", "F16": "<e"}


def claims(folder: Folder, config: Mapping[str, Any] | None) -> Claim | None:
    weights = bare_weights(folder) if config is None else None
    if weights is None or not any(".lora_down." in key for key in weights.header.tensors):
        return None
    return Claim(LIKELY, f"tensors in {weights.path} that are called lora_down, and no config")


def read(
    folder: Folder, config: Mapping[str, Any] | None, allow_fields: Collection[str]
) -> Adapter:
    """Raises NotFoundError for an image model, and for several text encoders in one file."""
    weights = required_weights(folder)
    _require_text(folder, weights)
    tensors, findings = _placed(weights.header.tensors)
    ranks = {m: t.shape[0] for (m, role), t in tensors.items() if role == "A" and t.shape}
    alphas = {m: _number(t) for (m, role), t in tensors.items() if role == "alpha"}
    # Of a module without alpha, alpha is the rank.
    alphas = {module: alphas.get(module) or float(rank) for module, rank in ranks.items()}
    if not ranks:
        raise DamagedError(f"{clean(folder.name)}/{clean(weights.path)} has no lora_down")
    rank = max(ranks.values())
    return Adapter(
        name=folder.name,
        kind="lora",
        format="kohya",
        fields=LoraFields(rank, alpha=float(rank), ranks=ranks, alphas=alphas),
        targets=Targets(tuple(sorted(ranks))),
        tensors={place: t for place, t in tensors.items() if place[1] != "alpha"},
        config={},
        unconsumed=tuple(f.tensor for f in findings),
        findings=(*weights.findings, *findings, *rest_of_file(weights)),
        files={weights.path: "weights"},
        portable=True,
    )


def _require_text(folder: Folder, weights: Weights) -> None:
    name = f"{clean(folder.name)}/{clean(weights.path)}"
    prefixes = set()
    for key in weights.header.tensors:
        match = PREFIX.match(key)
        if match is None and key.startswith("lora_"):
            part = clean(key.partition(".")[0], 60)
            raise NotFoundError(f"{name} is for an image model: it holds {part}, no text model has")
        prefixes.update([match[1]] if match else [])
    if len(prefixes) > 1:
        raise NotFoundError(f"{name} is for several models: {', '.join(sorted(prefixes))}")


def _placed(
    found: Mapping[str, Stored],
) -> tuple[dict[tuple[str, str], Stored], list[Finding]]:
    places: dict[tuple[str, str], Stored] = {}
    findings = []
    for key, stored in found.items():
        path, _, rest = key.partition(".")
        match = PREFIX.match(path)
        if match is None or rest not in ROLES or len(path) == match.end():
            want = "lora_te_MODULE.lora_down.weight, .lora_up.weight or .alpha"
            findings.append(Finding(ERROR, "unexpected-tensor", key, want, "another name"))
            continue
        place = dotted(path[match.end() :]), ROLES[rest]
        if place in places:
            about = f"also {places[place].key}"
            findings.append(Finding(ERROR, "duplicate-tensor", key, "one tensor", about))
        else:
            places[place] = stored
    return places, findings


def dotted(path: str) -> str:
    """model_layers_0_self_attn_q_proj -> model.layers.0.self_attn.q_proj"""
    kept = WORD.sub(lambda match: match[0].replace("_", "\0"), path)
    return kept.replace("_", ".").replace("\0", "_")


def _number(stored: Stored) -> float:
    """The value of a tensor that holds a single one."""
    if stored.dtype not in (*ALPHAS, "BF16") or stored.shape not in ((), (1,)):
        raise DamagedError(f"{clean(stored.key)} is {stored}, expected a single number")
    data = stored.read()
    if stored.dtype == "BF16":  # the upper half of a float32
        data = b"\0\0" + data
    value = float(struct.unpack(ALPHAS.get(stored.dtype, "<f"), data)[0])
    if not is_number(value) or abs(value) > MAX_NUMBER:
        raise DamagedError(f"{clean(stored.key)} is {value}, expected a finite number")
    return value
