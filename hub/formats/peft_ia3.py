"""`peft_type: IA3`.  peft 0.21 `tuners/ia3/config.py`."""

from __future__ import annotations

from collections.abc import Collection

from adapterkit.hub.fields import Ia3Fields
from adapterkit.hub.formats.config import ConfigReader
from adapterkit.hub.formats.peft_config import replaced
from adapterkit.hub.formats.peft_type import PeftType


def read(reader: ConfigReader, names: Collection[str]) -> Ia3Fields:
    reader.flag("fan_in_fan_out")  # checked only: the base's module type decides, as in PEFT
    fields = Ia3Fields(reader.names_or_pattern("feedforward_modules"), replaced(reader))
    reader.done()
    return fields


IA3 = PeftType(
    kind="ia3",
    endings={".ia3_l": "gain"},
    fields=read,
    known=frozenset({"feedforward_modules", "fan_in_fan_out"}),
    inert=frozenset({"init_ia3_weights"}),
)
