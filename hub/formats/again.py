"""Adapters of one format and one config as one of it: the same keys, other values."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.findings import clean
from adapterkit.hub.formats import adapterhub_write, peft_write
from adapterkit.hub.formats.adapterhub import WEIGHTS
from adapterkit.hub.formats.adapterhub_type import BOTTLENECK, architecture, renamed, split
from adapterkit.hub.formats.files import CONFIG, read_weights
from adapterkit.hub.formats.peft import WEIGHTS as PEFT_WEIGHTS
from adapterkit.hub.formats.peft_write import Part, Place
from adapterkit.hub.formats.safetensors_write import dump
from adapterkit.hub.sources import Folder, read_object
from adapterkit.registry.errors import InvalidError


def peft(
    adapters: Sequence[Adapter], parts: Mapping[Place, Part], changes: Mapping[str, Any]
) -> dict[str, bytes]:
    """Path -> content. The config is the first one's but for `changes`; a key is that of the first
    adapter that has the tensor. Raises InvalidError for keys that do not tell which they are."""
    config = {**adapters[0].config, **changes}
    named = [a for a in adapters if any(f.code == "adapter-name-in-keys" for f in a.findings)]
    if named and config.get("modules_to_save"):
        raise InvalidError(
            f"{clean(named[0].name)} has the adapter's name in its keys, and saved modules",
            hint="save it again with save_pretrained",
        )
    if named:
        return peft_write.files(config, parts)
    keys: dict[Place, str] = {}
    for adapter in adapters:
        for place, stored in adapter.tensors.items():
            keys.setdefault(place, stored.key)
    tensors = {keys[place]: part for place, part in parts.items()}
    return {CONFIG: adapterhub_write.text(config), PEFT_WEIGHTS[0]: dump(tensors)}


def adapterhub(
    folder: Folder, adapter: Adapter, parts: Mapping[Place, Part], changes: Mapping[str, Any]
) -> dict[str, bytes]:
    """Path -> content, under a name of its own, so that the library can load it beside its inputs.

    adapter: as it was read from the folder. changes: to the config of the method. Raises
    InvalidError for one with a head."""
    if adapter.files.keys() - {CONFIG} != {p for p, r in adapter.files.items() if r == "weights"}:
        raise InvalidError(
            f"{clean(adapter.name)} has a head beside it: heads have no average",
            hint="leave its files out of a copy, as AdapterHub's average_adapter leaves out heads",
        )
    (path,) = (path for path, role in adapter.files.items() if role == "weights")
    config = read_object(folder.files[CONFIG], f"{clean(folder.name)}/{CONFIG}")
    name, method = str(config["name"]), dict(config["config"])
    row = architecture(method.get("architecture") or BOTTLENECK).placed(method)
    places = {stored.key: place for place, stored in adapter.tensors.items()}
    tensors = {}
    for key in read_weights(folder, path).tensors:
        own = split(key, name)
        # of tensors that the library writes several times, the adapter keeps one
        place = places.get(key) or (None if own is None else row.place(own))
        if place is None:
            raise InvalidError(f"{clean(adapter.name)}: {clean(key)} belongs to nothing")
        tensors[renamed(key, name, adapterhub_write.NAME)] = parts[place]
    outer = {**config, "name": adapterhub_write.NAME, "config": {**method, **changes}}
    return {CONFIG: adapterhub_write.text(outer), WEIGHTS[0]: dump(tensors)}
