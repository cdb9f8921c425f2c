"""Folder formats, known by content: each translates a folder to the canonical form."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.findings import clean
from adapterkit.hub.sources import Folder, read_object
from adapterkit.registry.errors import NotFoundError

# name -> module with claims(config) and read(folder, config, allow_fields)
FORMATS = {"peft": "adapterkit.hub.formats.peft"}

CONFIG = "adapter_config.json"
# Fields by which the configs of other tools that use the same file name are known.
FOREIGN = {
    "AdapterHub": ("model_type", "model_name"),
    "MLX-LM": ("fine_tune_type", "lora_parameters"),
}


def read_folder(folder: Folder, allow_fields: Collection[str] = ()) -> Adapter:
    """The adapter in `folder`. Raises NotFoundError naming what is missing or not supported."""
    config = _config(folder)
    modules = [import_module(path) for path in FORMATS.values()]
    readers: list[Any] = [module for module in modules if module.claims(config)]
    if not readers:
        raise NotFoundError(f"{clean(folder.name)}/{CONFIG}: {_reason(config)}")
    adapter: Adapter = readers[0].read(folder, config, allow_fields)
    return adapter


def _config(folder: Folder) -> dict[str, Any]:
    if CONFIG in folder.files:
        return read_object(folder.files[CONFIG], f"{clean(folder.name)}/{CONFIG}")
    inside = sorted(path for path in folder.files if path.endswith(f"/{CONFIG}"))
    hint = f"give one of its subfolders: {', '.join(map(clean, inside[:10]))}" if inside else None
    state = "is empty" if not folder.files else "is not an adapter folder"
    raise NotFoundError(f"{clean(folder.name)} {state}: {CONFIG} is missing", hint=hint)


def _reason(config: dict[str, Any]) -> str:
    for tool, marks in FOREIGN.items():
        if any(mark in config for mark in marks):
            about = ", ".join(f"{mark} {clean(str(config.get(mark)), 40)}" for mark in marks)
            return f"written by {tool} ({about}), a format this version does not read"
    return "peft_type is missing, so this is not a PEFT adapter"
