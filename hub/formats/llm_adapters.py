"""LLM-Adapters' fork of PEFT, `peft_type: BOTTLENECK`: config and keys of its bottlenecks.

Hu et al. 2023, arXiv:2304.01933; AGI-Edgerunners/LLM-Adapters `peft/src/peft/tuners/bottleneck.py`.
"""

from __future__ import annotations

from collections.abc import Collection

from adapterkit.hub.fields import LlmBottleneckFields
from adapterkit.hub.formats.adapterhub_bottleneck import activation
from adapterkit.hub.formats.config import ConfigReader
from adapterkit.hub.formats.peft_config import MAX_RANK, replaced
from adapterkit.hub.formats.peft_type import PeftType

LEARNED = "learned"


def read(reader: ConfigReader, names: Collection[str]) -> LlmBottleneckFields:
    learned = reader.config.get("scaling") == LEARNED
    if reader.config.get("bottleneck_size") is None:
        reader.fault("bottleneck_size", "a size, as it is required")
    fields = LlmBottleneckFields(
        size=reader.count("bottleneck_size", 256, MAX_RANK),
        act=activation(reader, "non_linearity", "tanh"),
        scaling=1.0 if learned else reader.number("scaling", 1.0),
        learned=learned,
        parallel=reader.flag("use_parallel_adapter"),
        replaced=replaced(reader, only="adapter_only"),
    )
    reader.flag("use_adapterp")  # which only says what the default targets were
    reader.done()
    return fields


BOTTLENECK = PeftType(
    kind="llm_bottleneck",
    endings={
        ".adapter_down.weight": "down",
        ".adapter_up.weight": "up",
        ".adapter_scaling": "scaling",
    },
    fields=read,
    known=frozenset(
        ["bottleneck_size", "non_linearity", "scaling", "use_parallel_adapter", "use_adapterp",
         "bias"]
    ),
    inert=frozenset(["adapter_dropout", "init_weights"]),
)  # fmt: skip
