"""Adapters that are alike: of the same config and the same header, they differ in values alone.

What a folder says of itself and whether it fits the base follows from these two, so a second one is
not looked through again: checkpoints of one training, or adapters trained the same way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.findings import Finding
from adapterkit.hub.sources import ByteSource, Folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Files that say nothing of how tensors are applied.
BESIDE = {"README.md", ".gitattributes", ".gitignore", "LICENSE"}
MOST, LARGEST = 8, 16 * 2**20

Read = tuple[Adapter, Sequence[Finding]]


class Alike:
    """What was read of the last few, and found of them on one base."""

    def __init__(self) -> None:
        self._held: OrderedDict[Any, Read] = OrderedDict()

    def key(self, folder: Folder) -> Any:
        """None for a folder that has to be looked through."""
        files = folder.files
        if not {CONFIG, WEIGHTS} <= files.keys() <= {CONFIG, WEIGHTS, *BESIDE}:
            return None
        config, weights = files[CONFIG], files[WEIGHTS]
        if folder.hints or folder.remarks or config.size > LARGEST or weights.size < 8:
            return None
        length = int.from_bytes(weights.read(0, 8), "little")
        if length > min(LARGEST, weights.size - 8):
            return None
        return config.read(0, config.size), weights.read(8, length), weights.size

    def found(self, key: Any, folder: Folder) -> Read | None:
        if key is None or key not in self._held:
            return None
        self._held.move_to_end(key)
        adapter, findings = self._held[key]
        weights = folder.files[WEIGHTS]
        tensors = {place: replace(t, source=weights) for place, t in adapter.tensors.items()}
        return replace(adapter, name=folder.name, tensors=tensors), findings

    def hold(self, key: Any, adapter: Adapter, findings: Sequence[Finding]) -> None:
        """For a sound adapter, all of whose tensors lie in that one file."""
        if key is None or adapter.findings or not _is_plain(adapter.tensors):
            return
        self._held[key] = adapter, findings
        if len(self._held) > MOST:
            self._held.popitem(last=False)


def _is_plain(tensors: Mapping[Any, Any]) -> bool:
    sources: set[ByteSource] = {stored.source for stored in tensors.values()}
    return len(sources) == 1 and next(iter(sources)).name.endswith(WEIGHTS)
