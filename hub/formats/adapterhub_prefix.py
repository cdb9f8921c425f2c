"""AdapterHub's `prefix_tuning`.  adapters 1.3 `methods/prefix_tuning.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adapterkit.hub.fields import PrefixFields
from adapterkit.hub.findings import Finding
from adapterkit.hub.formats.adapterhub_type import Architecture, Key, Outer, Paths, Place
from adapterkit.hub.formats.config import ConfigReader, unsupported
from adapterkit.hub.formats.peft_prompt import MAX_COUNT

# What the library calls the attentions of a stack, and the flag that leaves them out.
LOCATIONS = {
    "self_prefix": "self",
    "self": "self",  # in DistilBERT
    "encoder_prefix": "encoder",
    "cross_prefix": "cross",
}
FLAGS = {"encoder": "encoder_prefix", "cross": "cross_prefix"}
# Families of two stacks; all others have the one location.
TWO_STACKS = frozenset({"t5"})
OTHER_STACKS = frozenset({"bart", "mbart", "encoder-decoder", "whisper", "plbart"})
ACTIVATIONS = {
    "tanh": "tanh",
    "relu": "relu",
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_orig": "gelu",
    "gelu_new": "gelu_new",
    "leakyrelu": "leaky_relu",
}
LAYER = re.compile(r"control_trans\.([024])\.(weight|bias)")


def place(key: Key) -> Place | None:
    if key.holder == "prefix_gates" and key.rest in ("weight", "bias"):
        return key.path.removesuffix(".prefix_tuning"), f"gate.{key.rest}"
    location, _, rest = key.rest.partition(".")
    if key.holder != "prefix_tunings" or location not in LOCATIONS:
        return None
    match = LAYER.fullmatch(rest)
    whole = {"wte.weight": "wte", "control_trans": "prefix"}
    part = f"mlp.{match[1]}.{match[2]}" if match else whole.get(rest)
    return None if part is None else ("", f"{LOCATIONS[location]}.{part}")


def read(reader: ConfigReader, outer: Outer, paths: Paths) -> PrefixFields:
    for flag in ("flat", *FLAGS.values()):
        reader.flag(flag)
    reader.count("bottleneck_size", 512, MAX_COUNT)  # checked only: the shapes say it
    gated = reader.flag("use_gating")
    shared = reader.config.get("shared_gating", True) is not False
    chosen = reader.choice("non_linearity", "tanh", tuple(ACTIVATIONS))
    places = ["self"]
    if outer.model_type in TWO_STACKS:
        places += [p for p, flag in FLAGS.items() if reader.config.get(flag, True) is not False]
    return PrefixFields(
        length=reader.count("prefix_length", 30, MAX_COUNT),
        activation=ACTIVATIONS[chosen],
        shifts=False,
        gate_rows=(1 if shared else 2) if gated else 0,
        places=tuple(places),
    )


def refusals(config: Mapping[str, Any], outer: Outer) -> list[Finding]:
    if outer.model_type in OTHER_STACKS:
        return [unsupported("architecture", f"a prefix for the stacks of {outer.model_type}")]
    return []


PREFIX = Architecture(
    kind="prefix",
    place=place,
    fields=read,
    known=frozenset(
        ["prefix_length", "bottleneck_size", "non_linearity", "flat", "use_gating",
         "shared_gating", *FLAGS.values()]
    ),
    inert=frozenset(["dropout", "init_weights_seed"]),
    refused={"leave_out": "layers without a prefix, beside others that have one"},
    refusals=refusals,
    repeated=frozenset(
        f"{location}.{part}"
        for location in LOCATIONS.values()
        for part in ("wte", "prefix", *(f"mlp.{i}.{p}" for i in "024" for p in ("weight", "bias")))
    ),
)  # fmt: skip
