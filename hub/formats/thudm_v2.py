"""P-Tuning v2 as its authors' code saves it: a checkpoint of the whole model and its prefix.

Source: THUDM/P-tuning-v2, `model/prefix_encoder.py`, `model/sequence_classification.py`. What it
repeats of the base is compared with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.fields import PrefixFields
from adapterkit.hub.findings import INFO, Finding, clean
from adapterkit.hub.formats.files import CERTAIN, Claim, read_config, weights_of
from adapterkit.hub.formats.peft_prompt import MAX_COUNT
from adapterkit.hub.headers import FLOATS, Stored
from adapterkit.hub.matching import Targets
from adapterkit.hub.sources import Folder, read_object

CONFIG, WEIGHTS = "config.json", ("model.safetensors", "pytorch_model.bin")
LENGTH, PROJECTION = "pre_seq_len", "prefix_projection"
EMBEDDING, NETWORK = "prefix_encoder.embedding.weight", "prefix_encoder.trans."
# What the models of that code put on top.
HEADS = ("classifier", "qa_outputs")
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# Of the base, which the config repeats.
REPEATED = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")
Tensors = dict[tuple[str, str], Stored]


def claims(folder: Folder, config: Mapping[str, Any] | None) -> Claim | None:
    if config is not None or CONFIG not in folder.files:
        return None
    found = read_object(folder.files[CONFIG], f"{clean(folder.name)}/{CONFIG}")
    return Claim(CERTAIN, f"{LENGTH} in {CONFIG}") if LENGTH in found else None


def read(
    folder: Folder, config: Mapping[str, Any] | None, allow_fields: Collection[str]
) -> Adapter:
    """Raises DamagedError, and NotFoundError where a file is missing."""
    reader = read_config(folder, CONFIG)
    config = reader.config
    if LENGTH not in config:
        reader.fault(LENGTH, f"an integer from 1 to {MAX_COUNT}")
    length, projected = reader.count(LENGTH, 1, MAX_COUNT), reader.flag(PROJECTION)
    reader.count("prefix_hidden_size", 512, MAX_COUNT)  # checked only: the shapes say it
    base = reader.text("_name_or_path")
    reader.done()
    weights = weights_of(folder, WEIGHTS)
    tensors, buffers = _placed(weights.header.tensors, projected)
    heads = {module for module, role in tensors if role.startswith("replace.")}
    return Adapter(
        name=folder.name,
        kind="prefix",
        format="thudm_v2",
        fields=PrefixFields(length),
        targets=Targets(saved=tuple(sorted(heads))),
        tensors=tensors,
        config=config,
        base_name=base,
        task=_task(config),
        findings=(*weights.findings, *(_buffer(key) for key in buffers)),
        files={CONFIG: "config", weights.path: "weights"},
        requires={name: config[name] for name in REPEATED if name in config},
    )


def _task(config: Mapping[str, Any]) -> str | None:
    """What the class of that code does, whose name is in the config."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    return next((task for end, task in TASKS.items() if name.endswith(end)), None)


def _placed(found: Mapping[str, Stored], projected: bool) -> tuple[Tensors, list[str]]:
    """Every weight, and the names of buffers, which hold positions and the like."""
    places: Tensors = {}
    buffers = []
    for key, stored in found.items():
        module, _, parameter = key.rpartition(".")
        if key == EMBEDDING:
            places["", "self.wte" if projected else "self.prefix"] = stored
        elif key.startswith(NETWORK):
            places["", f"self.mlp.{key.removeprefix(NETWORK)}"] = stored
        elif module in HEADS:
            places[module, f"replace.{parameter}"] = stored
        elif stored.dtype not in FLOATS and parameter == "position_ids":
            buffers.append(key)
        else:
            places[module, f"frozen.{parameter}"] = stored
    return places, buffers


def _buffer(key: str) -> Finding:
    return Finding(INFO, "buffer", key, "", "positions, which every model of this class has")
