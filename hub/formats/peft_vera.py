"""`peft_type: VERA`.  peft 0.21 `tuners/vera/config.py` and `model.py`."""

from __future__ import annotations

from collections.abc import Collection

from adapterkit.hub.fields import VeraFields
from adapterkit.hub.formats.config import ConfigReader, is_index
from adapterkit.hub.formats.peft_config import MAX_RANK, replaced
from adapterkit.hub.formats.peft_type import PeftType

SEED = "projection_prng_key"
# What a generator takes for a seed.
MAX_SEED = 1 << 63


def read(reader: ConfigReader, names: Collection[str]) -> VeraFields:
    seed = reader.config.get(SEED, 0)
    if not is_index(seed) or seed >= MAX_SEED:
        reader.fault(SEED, f"an integer from 0 to {MAX_SEED - 1}")
    reader.flag("save_projection")
    fields = VeraFields(
        rank=reader.count("r", 256, MAX_RANK),
        seed=seed,
        saved=reader.config.get("save_projection", True) is not False,
        replaced=replaced(reader, only="vera_only"),
    )
    reader.flag("fan_in_fan_out")  # checked only: the base's module type decides, as in PEFT
    reader.done()
    return fields


VERA = PeftType(
    kind="vera",
    endings={".vera_lambda_b": "lambda_b", ".vera_lambda_d": "lambda_d"},
    whole={"vera_A": "shared_A", "vera_B": "shared_B"},
    fields=read,
    known=frozenset({"r", SEED, "save_projection", "bias", "fan_in_fan_out"}),
    inert=frozenset({"vera_dropout", "d_initial", "init_weights"}),
)
