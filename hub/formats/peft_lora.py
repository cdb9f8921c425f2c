"""`peft_type: LORA`: what its config asks for, or why it is refused.

Source: peft 0.21 `tuners/lora/config.py`; older spellings back to 0.2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from packaging.version import Version

from adapterkit.hub.fields import LoraFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding
from adapterkit.hub.formats import peft_parameters
from adapterkit.hub.formats.config import ConfigReader
from adapterkit.hub.formats.peft_config import (
    MAX_RANK,
    replaced,
    resolved,
    targets,
    written_before,
)
from adapterkit.hub.formats.peft_type import PeftType
from adapterkit.hub.matching import Patterns

KNOWN = frozenset(
    [
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "use_dora",
        "lora_bias",
        "bias",
        "fan_in_fan_out",
        "trainable_token_indices",
        "ensure_weight_tying",
        "init_lora_weights",
        "lora_dropout",
        "runtime_config",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "megatron_core",
        "target_parameters",
    ]
)

# Options that change what the adapter computes and that nothing here applies.
REFUSED = {
    "layer_replication": "layers are repeated before the adapter is applied",
    "alora_invocation_tokens": "only tokens after an invocation sequence are adapted (aLoRA)",
    "use_qalora": "inputs are pooled (QALoRA)",
    "use_bdlora": "factors are block-diagonal (BD-LoRA)",
    "arrow_config": "adapters are routed by Arrow",
    "kasa_config": "singular values are adapted (KaSA)",
    "velora_config": "activations are compressed (VeLoRA)",
    "monteclora_config": "factors are sampled (MonteCLoRA)",
    "megatron_config": "layers are split over devices (Megatron)",
}
# PEFT 0.2 and 0.3 wrote them: when to merge, and what only means something in `peft_fused`.
INERT = frozenset({"merge_weights", "enable_lora"})

# Before it, PEFT read (experts, out, in) as (experts, in, out), and so wrote the factors of the
# transpose; 0.19.0 did so for some families only.
EXPERTS_AS_LINEAR = Version("0.19.1")

# These inits subtract their start from the base when PEFT loads the file.
MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
INITS = ("gaussian", "eva", "orthogonal", *MUTATING)
# Of these, what the base itself determines, and the kind computes.
STARTS = ("pissa", "olora")


def read(reader: ConfigReader, names: Collection[str]) -> LoraFields:
    ranks = reader.numbers_by_pattern("rank_pattern", integer=True)
    alphas = reader.numbers_by_pattern("alpha_pattern", integer=False)
    plain = LoraFields(
        rank=reader.count("r", 8, MAX_RANK),
        alpha=reader.number("lora_alpha", 8),
        rslora=reader.flag("use_rslora"),
        dora=reader.flag("use_dora"),
        lora_bias=reader.flag("lora_bias"),
        start=_start(reader.config) or "",
        transposed_experts=bool(reader.config.get("target_parameters"))
        and written_before(reader, EXPERTS_AS_LINEAR),
        replaced=replaced(reader, "trainable_token_indices", names),
    )
    parameters = targets(reader)
    reader.flag("fan_in_fan_out")  # checked only: the base's module type decides, as in PEFT
    _check_init(reader)
    reader.done()
    patterns = Patterns()
    paths = peft_parameters.paths(names, parameters)
    by_path = (
        resolved(ranks, paths, patterns, "rank_pattern"),
        resolved(alphas, paths, patterns, "alpha_pattern"),
    )
    ranks, alphas = ({paths[path]: value for path, value in each.items()} for each in by_path)
    return replace(plain, ranks=ranks, alphas=alphas)


def _check_init(reader: ConfigReader) -> None:
    value = reader.config.get("init_lora_weights", True)
    named = isinstance(value, str) and (value.lower() in INITS or value.startswith("pissa_niter_"))
    if not named and not isinstance(value, bool | None):
        reader.fault("init_lora_weights", f"a boolean or one of {', '.join(INITS)}")


def _start(config: Mapping[str, Any]) -> str | None:
    init = config.get("init_lora_weights")
    return init.lower() if isinstance(init, str) and init.lower() in STARTS else None


def refusals(config: Mapping[str, Any]) -> list[Finding]:
    if _start(config) is None:
        return mutations(config)
    clashing = ("use_dora", "lora_bias", "target_parameters")
    return [
        Finding(ERROR, UNSUPPORTED, field, f"no {field}", "init_lora_weights changes the base too")
        for field in clashing
        if config.get(field)
    ]


def mutations(config: Mapping[str, Any]) -> list[Finding]:
    """An init that changes the base, for those that compute none."""
    init = config.get("init_lora_weights")
    if not isinstance(init, str) or not init.lower().startswith(MUTATING):
        return []
    why = f"init_lora_weights {init!r} subtracts the adapter's start from the base at loading"
    hint = "convert it: PEFT saves plain LoRA with path_initial_model_for_weight_conversion"
    return [Finding(ERROR, UNSUPPORTED, "init_lora_weights", "a plain start", why, hint)]


LORA = PeftType(
    kind="lora",
    endings={
        ".lora_A.weight": "A",
        ".lora_B.weight": "B",
        ".lora_B.bias": "B_bias",
        ".lora_magnitude_vector": "magnitude",
        ".lora_magnitude_vector.weight": "magnitude",
        ".lora_embedding_A": "embedding_A",
        ".lora_embedding_B": "embedding_B",
    },
    fields=read,
    known=KNOWN,
    inert=INERT,
    refused=REFUSED,
    refusals=refusals,
    places=peft_parameters.places,
)
