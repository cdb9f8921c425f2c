"""`peft_type: ADALORA`.  peft 0.21 `tuners/adalora/config.py` and `layer.py`."""

from __future__ import annotations

from collections.abc import Collection

from adapterkit.hub.fields import AdaloraFields
from adapterkit.hub.formats import peft_lora
from adapterkit.hub.formats.config import MAX_NAMES, ConfigReader
from adapterkit.hub.formats.peft_config import MAX_RANK, replaced
from adapterkit.hub.formats.peft_type import PeftType

PATTERN = "rank_pattern"


def read(reader: ConfigReader, names: Collection[str]) -> AdaloraFields:
    initial = reader.count("init_r", 12, MAX_RANK)
    fields = AdaloraFields(
        initial=initial,
        alpha=reader.number("lora_alpha", 8),
        ranks=_kept(reader, initial),
        replaced=replaced(reader, "trainable_token_indices", names),
    )
    reader.flag("fan_in_fan_out")  # checked only: the base's module type decides, as in PEFT
    reader.done()
    return fields


def _kept(reader: ConfigReader, initial: int) -> dict[str, int]:
    """Pruning writes, for each tensor of singular values, which of them are left."""
    table = reader.config.get(PATTERN) or {}
    right = isinstance(table, dict) and all(
        isinstance(kept, list) and len(kept) == initial and all(isinstance(k, bool) for k in kept)
        for kept in table.values()
    )
    if not right or len(table) > MAX_NAMES:
        reader.fault(PATTERN, f"an object of lora_E to lists of init_r ({initial}) booleans")
        return {}
    return {name.rpartition(".lora_E")[0]: sum(kept) for name, kept in table.items()}


ADALORA = PeftType(
    kind="adalora",
    endings={".lora_A": "A", ".lora_B": "B", ".lora_E": "E"},
    fields=read,
    known=frozenset(
        [
            "init_r",
            "lora_alpha",
            PATTERN,
            "bias",
            "fan_in_fan_out",
            "trainable_token_indices",
            "ensure_weight_tying",
        ]
    ),
    inert=frozenset(
        [
            "r",
            "target_r",
            "tinit",
            "tfinal",
            "deltaT",
            "beta1",
            "beta2",
            "orth_reg_weight",
            "total_step",
            "lora_dropout",
            "runtime_config",
            "loftq_config",
            "eva_config",
            "corda_config",
            "lora_ga_config",
            "qalora_group_size",
            "megatron_core",
            # PEFT does not look at these for this type
            "alpha_pattern",
            "use_rslora",
            "init_lora_weights",
        ]
    ),
    refused={
        **peft_lora.REFUSED,
        "use_dora": "magnitudes are trained (DoRA), which PEFT refuses for this type",
        "lora_bias": "B has a bias, which PEFT refuses for this type",
        "target_parameters": "parameters that are not modules are adapted, without their E",
    },
)
