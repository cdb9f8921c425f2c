"""`peft_type: BOFT`.  peft 0.21 `tuners/boft/config.py`."""

from __future__ import annotations

from collections.abc import Collection

from adapterkit.hub.fields import BoftFields
from adapterkit.hub.formats.config import ConfigReader
from adapterkit.hub.formats.peft_config import MAX_RANK, replaced, size_or_zero
from adapterkit.hub.formats.peft_type import PeftType

# Each doubles the run of inputs that is turned together.
MAX_STAGES = 20


def read(reader: ConfigReader, names: Collection[str]) -> BoftFields:
    count = size_or_zero(reader, "boft_block_num", 0, MAX_RANK)
    size = size_or_zero(reader, "boft_block_size", 4, MAX_RANK)
    if bool(count) == bool(size):
        state = "not " if count else ""
        reader.fault("boft_block_size", f"0 or not, as boft_block_num is {state}0")
    reader.flag("fan_in_fan_out")  # checked only: the base's module type decides, as in PEFT
    fields = BoftFields(
        size=size,
        count=count,
        stages=reader.count("boft_n_butterfly_factor", 1, MAX_STAGES),
        replaced=replaced(reader, only="boft_only"),
    )
    reader.done()
    return fields


BOFT = PeftType(
    kind="boft",
    endings={".boft_R": "blocks", ".boft_s": "scale"},
    fields=read,
    known=frozenset(
        [
            "boft_block_size",
            "boft_block_num",
            "boft_n_butterfly_factor",
            "bias",
            "fan_in_fan_out",
        ]
    ),
    inert=frozenset({"boft_dropout", "init_weights"}),
)
