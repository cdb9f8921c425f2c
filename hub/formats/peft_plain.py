"""`peft_type: LN_TUNING` and `BEFT`: the tensors say all.  peft 0.21 `tuners/ln_tuning`, `beft`."""

from __future__ import annotations

from collections.abc import Collection

from adapterkit.hub.fields import PlainFields
from adapterkit.hub.formats.config import ConfigReader
from adapterkit.hub.formats.peft_config import replaced
from adapterkit.hub.formats.peft_type import PeftType


def read(reader: ConfigReader, names: Collection[str]) -> PlainFields:
    fields = PlainFields(replaced(reader))
    reader.done()
    return fields


LN_TUNING = PeftType(
    kind="ln_tuning",
    endings={
        ".ln_tuning_layers.weight": "replace.weight",
        ".ln_tuning_layers.bias": "replace.bias",
    },
    fields=read,
    known=frozenset(),
)

BEFT = PeftType(
    kind="beft",
    endings={".beft_bias": "shift"},
    fields=read,
    known=frozenset(),
    inert=frozenset({"init_weights"}),
)
