"""The PEFT folder: `adapter_config.json` beside `adapter_model.safetensors`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.findings import clean
from adapterkit.hub.formats import peft_config as config_rules
from adapterkit.hub.formats.config import ConfigReader
from adapterkit.hub.formats.files import CERTAIN, CONFIG, LIKELY, Claim, weights_of
from adapterkit.hub.formats.peft_keys import Keys, read_keys
from adapterkit.hub.formats.peft_start import completed
from adapterkit.hub.formats.peft_type import OTHER_TYPES, PEFT_TYPES, PeftType, peft_type
from adapterkit.hub.headers import Header, Stored
from adapterkit.hub.matching import Targets
from adapterkit.hub.sources import Folder
from adapterkit.registry.errors import DamagedError, NotFoundError

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def claims(folder: Folder, config: Mapping[str, Any] | None) -> Claim | None:
    """By the config; of a type that it does not apply, another format may know more."""
    if config is None or "peft_type" not in config:
        return None
    name = config["peft_type"]
    known = isinstance(name, str) and name in PEFT_TYPES
    evidence = f"peft_type {clean(str(name), 40)} in {CONFIG}"
    return Claim(CERTAIN if known else LIKELY, evidence)


def read(
    folder: Folder, config: Mapping[str, Any] | None, allow_fields: Collection[str]
) -> Adapter:
    """The adapter in canonical form. Raises DamagedError if a file or a field is malformed and
    NotFoundError if it is of a type this program does not have."""
    if config is None:
        raise NotFoundError(f"{clean(folder.name)} is not an adapter of PEFT: {CONFIG} is missing")
    name = _type(config, folder.name)
    weights = weights_of(folder, WEIGHTS)
    header = weights.header
    row = peft_type(name, config, header.tensors)
    reader = ConfigReader(config, f"{folder.name}/{CONFIG}")
    targets = config_rules.targets(reader)
    base, revision = reader.text("base_model_name_or_path"), reader.text("revision")
    task, writer = reader.text("task_type"), reader.text("peft_version")
    fields, places, keys = _canonical(reader, row, header, targets)
    targets.require_usable(module for module, _ in places)
    names, unknown = config_rules.unknown(config, row, allow_fields)
    refused = config_rules.refusals(config, row)
    adapter = Adapter(
        name=folder.name,
        kind=row.kind,
        format="peft",
        fields=fields,
        targets=targets,
        tensors=places,
        config=config,
        unconsumed=tuple(keys.strays),
        unknown_fields=tuple(names),
        base_name=base,
        revision=revision,
        task=task,
        writer=writer,
        findings=(*weights.findings, *refused, *unknown, *keys.findings),
        files={CONFIG: "config", weights.path: "weights"},
    )
    return completed(adapter, folder)


def _canonical(
    reader: ConfigReader, row: PeftType, header: Header, targets: Targets
) -> tuple[Any, dict[tuple[str, str], Stored], Keys]:
    """Fields, placed tensors and key findings; patterns are resolved for the modules found."""
    keys = read_keys(header.tensors, row, row.fields(reader, ()).replaced, targets)
    modules = {module for module, _ in keys.places.values() if module}
    places = {
        place: row.shaped(place[1], header.tensors[key]) for key, place in keys.places.items()
    }
    return row.fields(reader, sorted(modules)), places, keys


def _type(config: Mapping[str, Any], name: str) -> str:
    value = config.get("peft_type")
    if isinstance(value, str) and value in PEFT_TYPES:
        return value
    shown = clean(str(value), 60)
    if isinstance(value, str) and value.upper() in PEFT_TYPES:
        raise DamagedError(
            f"{clean(name)}/{CONFIG}: peft_type is {shown}, expected {value.upper()}"
        )
    if isinstance(value, str) and value in OTHER_TYPES:
        raise NotFoundError(
            f"{clean(name)}: adapters of type {shown} are known, but not applied by this version",
            hint=f"this version reads {', '.join(sorted(PEFT_TYPES))}",
        )
    raise NotFoundError(f"{clean(name)}/{CONFIG}: peft_type {shown} is not a known adapter type")
