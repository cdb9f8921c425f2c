"""`adapter_config.json` of PEFT: what each field asks for, or why it is refused.

Source: peft 0.21 `tuners/lora/config.py`, `config.py`; older spellings back to 0.2.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from adapterkit.hub.fields import LoraFields, ReplacedFields, TokensFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, WARNING, Finding, clean
from adapterkit.hub.formats.config import ConfigReader, is_blank, is_index
from adapterkit.hub.matching import Patterns, Targets, by_pattern

# Larger than any layer that exists; a rank beyond it is a damaged file, not a big adapter.
MAX_RANK = 1 << 16

COMMON = frozenset(
    [
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
    ]
)
LORA = frozenset(
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
    ]
)
TOKENS = frozenset({"token_indices", "init_weights", "ensure_weight_tying"})

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
    "target_parameters": "parameters that are not modules are adapted (fused experts)",
    "lora_use_mixer": "a mixer stands between A and B (MoSLoRA)",
    "enable_lora": "one fused matrix holds several adapters (loralib MergedLinear)",
}
# PEFT 0.2 and 0.3 wrote it; it only said when to merge.
INERT = frozenset({"merge_weights"})

# These inits subtract their start from the base when PEFT loads the file.
MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
INITS = ("gaussian", "eva", "orthogonal", *MUTATING)

# `ensure_weight_tying` is without effect in PEFT for tables of any other name (GPT-2's `wte`).
TIED_TABLES = ("embed_tokens", "lm_head")

KINDS = {"LORA": "lora", "TRAINABLE_TOKENS": "trainable_tokens"}
OTHER_TYPES = frozenset(
    [
        "ADALORA",
        "ADAMSS",
        "ADAPTION_PROMPT",
        "BEFT",
        "BOFT",
        "BOTTLENECK",
        "C3A",
        "CARTRIDGE",
        "CPT",
        "DEFT",
        "DELORA",
        "FOURIERFT",
        "FROD",
        "GLORA",
        "GRALORA",
        "HIRA",
        "HRA",
        "IA3",
        "LILY",
        "LN_TUNING",
        "LOHA",
        "LOKR",
        "MISS",
        "MULTITASK_PROMPT_TUNING",
        "OFT",
        "OSF",
        "PEANUT",
        "POLY",
        "PREFIX_TUNING",
        "PROMPT_TUNING",
        "PSOFT",
        "PVERA",
        "P_TUNING",
        "RANDLORA",
        "ROAD",
        "SHADOW",
        "SHIRA",
        "SUPERTUNING",
        "TINYLORA",
        "UNILORA",
        "VBLORA",
        "VERA",
        "WAVEFT",
        "XLORA",
    ]
)


def known_fields(kind: str) -> frozenset[str]:
    if kind == "trainable_tokens":
        return COMMON | TOKENS
    return COMMON | LORA | INERT | REFUSED.keys()


def targets(reader: ConfigReader) -> Targets:
    return Targets(
        modules=reader.names_or_pattern("target_modules"),
        exclude=reader.names_or_pattern("exclude_modules"),
        layers=reader.integers("layers_to_transform"),
        layers_pattern=reader.names("layers_pattern"),
        saved=reader.names("modules_to_save"),
    )


def lora_fields(reader: ConfigReader, modules: Iterable[str]) -> LoraFields:
    """`modules`: those of the file, for which the patterns are resolved."""
    names = list(modules)
    ranks = reader.numbers_by_pattern("rank_pattern", integer=True)
    alphas = reader.numbers_by_pattern("alpha_pattern", integer=False)
    plain = LoraFields(
        rank=reader.count("r", 8, MAX_RANK),
        alpha=reader.number("lora_alpha", 8),
        rslora=reader.flag("use_rslora"),
        dora=reader.flag("use_dora"),
        lora_bias=reader.flag("lora_bias"),
        replaced=_replaced(reader, "trainable_token_indices", names),
    )
    reader.flag("fan_in_fan_out")  # checked only: the base's module type decides, as in PEFT
    _check_init(reader)
    reader.done()
    patterns = Patterns()
    return replace(
        plain,
        ranks=_resolved(ranks, names, patterns, "rank_pattern"),
        alphas=_resolved(alphas, names, patterns, "alpha_pattern"),
    )


def tokens_fields(reader: ConfigReader) -> TokensFields:
    fields = _replaced(reader, "token_indices", ())
    if not fields.tokens:
        reader.fault("token_indices", "a list of token ids")
    reader.done()
    return TokensFields(fields)


def _resolved(
    table: Mapping[str, Any], names: list[str], patterns: Patterns, field: str
) -> dict[str, Any]:
    found = {name: by_pattern(table, name, patterns, field) for name in names if table}
    return {name: value for name, value in found.items() if value is not None}


def _replaced(reader: ConfigReader, tokens_field: str, modules: Iterable[str]) -> ReplacedFields:
    tables = any(name.rpartition(".")[2] in TIED_TABLES for name in modules)
    return ReplacedFields(
        bias=reader.choice("bias", "none", ("none", "all", "lora_only")),
        saved=reader.names("modules_to_save"),
        tokens=_tokens(reader, tokens_field),
        tie=reader.flag("ensure_weight_tying") and tables,
    )


def _tokens(reader: ConfigReader, field: str) -> dict[str, tuple[int, ...]]:
    value = reader.config.get(field)
    if is_blank(value):
        return {}
    table: dict[str, Any] = value if isinstance(value, dict) else {"": value}
    for rows in table.values():
        if not isinstance(rows, list) or not rows or not all(is_index(row) for row in rows):
            reader.fault(field, "lists of token ids")
            return {}
        if len(set(rows)) < len(rows):
            reader.fault(field, "token ids without duplicates")
            return {}
    return {module: tuple(rows) for module, rows in table.items()}


def _check_init(reader: ConfigReader) -> None:
    value = reader.config.get("init_lora_weights", True)
    named = isinstance(value, str) and (value.lower() in INITS or value.startswith("pissa_niter_"))
    if not named and not isinstance(value, bool | None):
        reader.fault("init_lora_weights", f"a boolean or one of {', '.join(INITS)}")


def refusals(config: Mapping[str, Any]) -> list[Finding]:
    """Options that would have to be applied and are not supported, by name and reason."""
    found = [
        Finding(ERROR, UNSUPPORTED, field, f"no {field}", why)
        for field, why in REFUSED.items()
        if not is_blank(config.get(field))
    ]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(MUTATING):
        why = f"init_lora_weights {init!r} subtracts the adapter's start from the base at loading"
        hint = "convert it: PEFT saves plain LoRA with path_initial_model_for_weight_conversion"
        found.append(Finding(ERROR, UNSUPPORTED, "init_lora_weights", "a plain start", why, hint))
    return found


def unknown(
    config: Mapping[str, Any], kind: str, allowed: Collection[str]
) -> tuple[list[str], list[Finding]]:
    """Fields this program does not know: a warning when they ask for nothing, else an error."""
    names = sorted(set(config) - known_fields(kind))
    findings = []
    for name in names:
        harmless = is_blank(config[name]) or name in allowed
        findings.append(
            Finding(
                WARNING if harmless else ERROR,
                "unknown-field",
                name,
                "a known config field",
                clean(repr(config[name]), 80),
                "" if harmless else f"--allow-field {clean(name)} if it changes nothing",
            )
        )
    return names, findings
