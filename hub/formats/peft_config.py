"""`adapter_config.json` of PEFT: what all of its types have in common.  peft 0.21 `config.py`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from packaging.version import InvalidVersion, Version

from adapterkit.hub.fields import ReplacedFields
from adapterkit.hub.findings import Finding
from adapterkit.hub.formats.config import (
    ConfigReader,
    is_blank,
    is_index,
    unknown_fields,
    unsupported,
)
from adapterkit.hub.formats.peft_type import PeftType
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
# `ensure_weight_tying` is without effect in PEFT for tables of any other name (GPT-2's `wte`).
TIED_TABLES = ("embed_tokens", "lm_head")

# Fields that only PEFT 0.2 and 0.3 wrote, whose target lists are looser.
OLD = frozenset({"merge_weights", "enable_lora"})


def targets(reader: ConfigReader) -> Targets:
    return Targets(
        modules=reader.names_or_pattern("target_modules"),
        exclude=reader.names_or_pattern("exclude_modules"),
        layers=reader.integers("layers_to_transform"),
        layers_pattern=reader.names("layers_pattern"),
        saved=reader.names("modules_to_save"),
        loose=not OLD.isdisjoint(reader.config),
        parameters=reader.names("target_parameters"),
    )


def resolved(
    table: Mapping[str, Any], names: Collection[str], patterns: Patterns, field: str
) -> dict[str, Any]:
    found = {name: by_pattern(table, name, patterns, field) for name in names if table}
    return {name: value for name, value in found.items() if value is not None}


def replaced(
    reader: ConfigReader,
    tokens_field: str = "",
    modules: Collection[str] = (),
    only: str = "lora_only",
) -> ReplacedFields:
    """tokens_field: where the type keeps the rows it replaces, "" if it has no such field.
    only: what it calls training the biases of the modules it targets."""
    bias = reader.choice("bias", "none", ("none", "all", only))
    tables = any(name.rpartition(".")[2] in TIED_TABLES for name in modules)
    return ReplacedFields(
        bias="lora_only" if bias == only else bias,
        tokens=_tokens(reader, tokens_field),
        tie=reader.flag("ensure_weight_tying") and tables,
    )


def size_or_zero(reader: ConfigReader, field: str, default: int, limit: int) -> int:
    """0 where another field says it."""
    value = reader.config.get(field, default)
    return 0 if value == 0 and value is not False else reader.count(field, default, limit)


def written_before(reader: ConfigReader, version: Version) -> bool:
    """Whether an older PEFT wrote it; those up to 0.17 do not say."""
    written = reader.text("peft_version")
    try:  # a commit may stand behind an @
        return written is None or Version(written.partition("@")[0]) < version
    except InvalidVersion:
        reader.fault("peft_version", "a version")
        return False


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


def refusals(config: Mapping[str, Any], row: PeftType) -> list[Finding]:
    """Options that would have to be applied and are not supported, by name and reason."""
    found = [
        unsupported(field, why)
        for field, why in row.refused.items()
        if not is_blank(config.get(field))
    ]
    return found + row.refusals(config)


def unknown(
    config: Mapping[str, Any], row: PeftType, allowed: Collection[str]
) -> tuple[list[str], list[Finding]]:
    """Fields this program does not know: a warning when they ask for nothing, else an error."""
    known = COMMON | row.known | row.inert | row.refused.keys()
    return unknown_fields(config, known, allowed)
