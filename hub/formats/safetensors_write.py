"""The bytes of a safetensors file: the same for the same tensors.

Format: https://github.com/huggingface/safetensors#format; read by `headers`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from adapterkit.hub.headers import DTYPE_BITS, Stored


@dataclass(frozen=True)
class Part:
    """A tensor to be written. dtype: as safetensors calls it. data: its bytes, one by one."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    @classmethod
    def of(cls, stored: Stored) -> Part:
        return cls(stored.dtype, stored.shape, stored.read())


def dump(tensors: Mapping[str, Part]) -> bytes:
    """Wide types first, so that every tensor is aligned; then by name."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(tensors.items(), key=lambda item: (-DTYPE_BITS[item[1].dtype], item[0]))
    end = 0
    for name, part in ordered:
        start, end = end, end + len(part.data)
        entry = {"dtype": part.dtype, "shape": list(part.shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    size = len(text).to_bytes(8, "little")
    return b"".join([size, text, *(part.data for _, part in ordered)])
