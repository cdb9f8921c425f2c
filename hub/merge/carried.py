"""The files of a merged model beside its weights: config, index, and what is copied as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.folder import CONFIG, open_base
from adapterkit.hub.quant.packing import Scheme
from adapterkit.hub.sources import Folder
from adapterkit.registry.files import Files

RECORD = "adapterkit.json"
# Of the base's files beside the weights; a card describes the base, not the result.
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".spm", ".vocab")
LEGAL = ("license", "notice", "copying", "use_policy")
# What the merge writes itself, or what only belongs to weights that are not carried.
LEFT = (CONFIG, RECORD)
FOLDERS = ("additional_chat_templates",)


def is_carried(name: str) -> bool:
    if name.lower().startswith(LEGAL):
        return True
    return name.endswith(COPIED) and not name.endswith(".index.json") and name not in LEFT


def carried(folder: Path) -> Folder:
    """The files of the base that the merged model gets as they are."""
    found = open_base(folder)
    files = {name: source for name, source in found.files.items() if is_carried(name)}
    for inner in FOLDERS:
        if (folder / inner).is_dir():
            more = open_base(folder / inner).files
            files |= {f"{inner}/{name}": source for name, source in more.items()}
    return Folder(found.name, files, folder)


def copy(files: Files, source: Folder, target: Path) -> None:
    for name, held in source.files.items():
        path = target / name
        files.mkdir(path.parent)
        write(files, path, held.read(0, held.size))


def write(files: Files, path: Path, data: bytes) -> None:
    with files.create(path) as file:
        files.write(file, data)
        files.fsync(file)


def text(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def merged_config(
    base: Base, changes: Mapping[str, Any], scheme: Scheme | None, dtype: str | None
) -> dict[str, Any]:
    """changes: fields that the merge itself changes. dtype: of all weights, where it is chosen."""
    config = dict(base.config)
    kept = config.pop("quantization_config", None)
    if dtype is not None:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    config.update(changes)
    if scheme is not None and scheme == Scheme.of(base.quantization):
        config["quantization_config"] = kept
    elif scheme is not None:
        said = config.get("dtype") or config.get("torch_dtype") or "float32"
        config["quantization_config"] = quantization_config(scheme, str(said))
    return config


def quantization_config(scheme: Scheme, compute: str) -> dict[str, Any]:
    """As transformers writes it for what `load` quantizes."""
    four = scheme.method != "int8"
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": compute if four else "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": scheme.method if four else "fp4",
        "bnb_4bit_use_double_quant": four and scheme.double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }


def index(weight_map: Mapping[str, str], size: int) -> bytes:
    return text({"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def needs_index(names: list[str]) -> bool:
    return names != ["model.safetensors"]
