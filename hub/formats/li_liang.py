"""Prefix-Tuning as its authors' code saves it: `config.json` beside `pytorch_model.bin`.

Source: XiangLi1999/PrefixTuning, `gpt2/train_control.py` (PrefixTuning).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.fields import PrefixFields
from adapterkit.hub.findings import ERROR, Finding, clean
from adapterkit.hub.formats.config import unsupported
from adapterkit.hub.formats.files import CERTAIN, Claim, read_config, weights_of
from adapterkit.hub.formats.peft_prompt import MAX_COUNT
from adapterkit.hub.headers import Stored
from adapterkit.hub.matching import Targets
from adapterkit.hub.sources import Folder, read_object

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
MARKS = {"preseqlen", "mid_dim"}
LENGTH, MODE = "preseqlen", "_my_arg_tune_mode"
# Of the base, which the config of the prefix repeats.
REPEATED = ("model_type", "n_embd", "n_layer", "n_head")
LAYER = re.compile(r"control_trans\.([024])\.(weight|bias)")


def claims(folder: Folder, config: Mapping[str, Any] | None) -> Claim | None:
    if config is not None or CONFIG not in folder.files:
        return None
    found = MARKS & read_object(folder.files[CONFIG], f"{clean(folder.name)}/{CONFIG}").keys()
    return Claim(CERTAIN, f"{' and '.join(sorted(found))} in {CONFIG}") if found == MARKS else None


def read(
    folder: Folder, config: Mapping[str, Any] | None, allow_fields: Collection[str]
) -> Adapter:
    """Raises DamagedError, and NotFoundError where a file is missing."""
    reader = read_config(folder, CONFIG)
    config = reader.config
    if LENGTH not in config:
        reader.fault(LENGTH, f"an integer from 1 to {MAX_COUNT}")
    fields = PrefixFields(reader.count(LENGTH, 1, MAX_COUNT))
    reader.count("mid_dim", 1, MAX_COUNT)  # checked only: the shapes say it
    base = reader.text("_name_or_path")
    reader.done()
    weights = weights_of(folder, WEIGHTS)
    tensors, strays = _placed(weights.header.tensors)
    about = "an extra tensor that belongs to nothing"
    odd = [
        Finding(ERROR, "unexpected-tensor", key, "wte or control_trans", about) for key in strays
    ]
    return Adapter(
        name=folder.name,
        kind="prefix",
        format="li_liang",
        fields=fields,
        targets=Targets(),
        tensors=tensors,
        config=config,
        unconsumed=tuple(strays),
        base_name=base,
        task="CAUSAL_LM",
        findings=(*weights.findings, *odd, *_refusals(config)),
        files={CONFIG: "config", weights.path: "weights"},
        requires={name: config[name] for name in REPEATED if name in config},
    )


def _placed(found: Mapping[str, Stored]) -> tuple[dict[tuple[str, str], Stored], list[str]]:
    places: dict[tuple[str, str], Stored] = {}
    strays = []
    for key, stored in found.items():
        match = LAYER.fullmatch(key)
        if key == "wte.weight":
            places["", "self.wte"] = stored
        elif match:
            places["", f"self.mlp.{match[1]}.{match[2]}"] = stored
        else:
            strays.append(key)
    return places, strays


def _refusals(config: Mapping[str, Any]) -> list[Finding]:
    """Other ways to train that the same code has."""
    found = []
    if config.get(MODE, "prefixtune") != "prefixtune":
        found.append(unsupported(MODE, f"{clean(repr(config[MODE]), 40)}, not prefixtune"))
    if config.get("optim_prefix", True) is not True:
        found.append(unsupported("optim_prefix", "without it the prefix comes from the input"))
    if config.get("use_infix"):
        found.append(unsupported("use_infix", "keys between the parts of the input"))
    return found
