"""mlx-lm: `adapters.safetensors` beside an `adapter_config.json` that holds all of its arguments.

Source: mlx-lm 0.32 `lora.py`, `tuner/utils.py`, `tuner/lora.py`, `tuner/dora.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.fields import LoraFields, ReplacedFields
from adapterkit.hub.findings import ERROR, UNSUPPORTED, Finding, clean
from adapterkit.hub.formats.config import ConfigReader, unknown_fields
from adapterkit.hub.formats.files import CERTAIN, CONFIG, Claim, weights_of
from adapterkit.hub.formats.peft_config import MAX_RANK
from adapterkit.hub.formats.peft_keys import TABLES
from adapterkit.hub.headers import Stored
from adapterkit.hub.matching import Targets
from adapterkit.hub.sources import Folder
from adapterkit.hub.strided import transposed
from adapterkit.registry.errors import NotFoundError

WEIGHTS = ("adapters.safetensors",)
PARAMETERS = "lora_parameters"
MARKS = {"fine_tune_type", PARAMETERS}
# Arguments of the training alone, whose values change nothing in what was saved.
TRAINING = frozenset(
    [
        "train", "optimizer", "optimizer_config", "data", "seed", "batch_size", "iters",
        "val_batches", "learning_rate", "steps_per_report", "steps_per_eval",
        "resume_adapter_file", "adapter_path", "save_every", "test", "test_batches",
        "max_seq_length", "config", "grad_checkpoint", "grad_accumulation_steps",
        "clear_cache_threshold", "lr_schedule", "mask_prompt", "report_to", "project_name",
        "trust_remote_code", "wandb", "prompt_feature", "completion_feature",
    ]
)  # fmt: skip
# The newer name, and the one before it.
LAYERS = ("num_layers", "lora_layers")
KNOWN = TRAINING | MARKS | {"model", *LAYERS}
# `alpha` and `dropout` stand beside the scale in older files and are not used for the result.
INNER = {"rank", "scale", "keys", "dropout", "alpha"}
ROLES = {"lora_a": "A", "lora_b": "B", "m": "magnitude"}
Tensors = dict[tuple[str, str], Stored]


def claims(folder: Folder, config: Mapping[str, Any] | None) -> Claim | None:
    marks = sorted(MARKS & config.keys()) if config is not None else []
    if not marks:
        return None
    return Claim(CERTAIN, f"{' and '.join(marks)} in {CONFIG}")


def read(
    folder: Folder, config: Mapping[str, Any] | None, allow_fields: Collection[str]
) -> Adapter:
    """Raises DamagedError, and NotFoundError for weights that were trained in full."""
    config = config or {}
    reader = ConfigReader(config, f"{folder.name}/{CONFIG}")
    tuned = reader.choice("fine_tune_type", "lora", ("lora", "dora", "full"))
    if tuned == "full":
        raise NotFoundError(
            f"{clean(folder.name)} holds whole weights (fine_tune_type full), not an adapter"
        )
    inner = _parameters(reader)
    rank, scale = inner.count("rank", 8, MAX_RANK), inner.number("scale", 20.0)
    keys, layers = inner.names("keys"), _layers(reader)
    base = reader.text("model")
    reader.faults += inner.faults
    reader.done()
    weights = weights_of(folder, WEIGHTS)
    tensors, findings = _placed(weights.header.tensors)
    table = any(role == "embedding_A" for _, role in tensors)
    fields = LoraFields.scaled(
        rank, scale, dora=tuned == "dora", replaced=ReplacedFields(tie=table)
    )
    modules = tuple(sorted({module for module, _ in tensors}))
    names, unknown = unknown_fields(config, KNOWN, allow_fields)
    return Adapter(
        name=folder.name,
        kind="lora",
        format="mlx",
        fields=fields,
        targets=Targets(keys, last=layers) if keys else Targets(modules),
        tensors=tensors,
        config=config,
        unconsumed=tuple(f.tensor for f in findings if f.code == "unexpected-tensor"),
        unknown_fields=tuple(names),
        base_name=base,
        findings=(*weights.findings, *findings, *unknown),
        files={CONFIG: "config", weights.path: "weights"},
    )


def _parameters(reader: ConfigReader) -> ConfigReader:
    value = reader.config.get(PARAMETERS)
    if not isinstance(value, dict):
        reader.fault(PARAMETERS, "an object with rank and scale")
        reader.done()
        value = {}
    inner = ConfigReader(value, reader.name)
    missing = [name for name in ("rank", "scale") if name not in value]
    inner.faults += [f"{PARAMETERS} has no {name}" for name in missing]
    for name in sorted(value.keys() - INNER):
        inner.fault(name, f"no such field in {PARAMETERS}")
    return inner


def _layers(reader: ConfigReader) -> int | None:
    """How many of the last layers have adapters; None for all, which -1 says too."""
    field = next((name for name in LAYERS if name in reader.config), LAYERS[0])
    if reader.config.get(field) in (None, -1):
        return None
    return reader.count(field, 16, MAX_RANK)


def _placed(found: Mapping[str, Stored]) -> tuple[Tensors, list[Finding]]:
    """Factors are stored as the transpose of what multiplies: lora_a (in, r), lora_b (r, out)."""
    places: Tensors = {}
    findings = []
    for key, stored in found.items():
        module, _, parameter = key.rpartition(".")
        role = ROLES.get(parameter)
        table = module.rpartition(".")[2] in TABLES and not module.endswith("lm_head")
        if not module or role is None:
            want = "lora_a, lora_b or m of a module"
            findings.append(Finding(ERROR, "unexpected-tensor", key, want, "another name"))
        elif len(stored.shape) == 3:
            want, about = "factors of a module", "factors of experts (LoRASwitchLinear)"
            findings.append(Finding(ERROR, UNSUPPORTED, key, want, about))
        elif table and role == "magnitude":
            want, about = "DoRA of a linear layer", "DoRA of an embedding"
            findings.append(Finding(ERROR, UNSUPPORTED, key, want, about))
        else:
            places[module, f"embedding_{role}" if table else role] = transposed(stored)
    return places, findings
