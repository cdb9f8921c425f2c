"""Stored bytes -> torch tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from adapterkit.hub.adapter import Adapter
from adapterkit.hub.findings import clean
from adapterkit.hub.headers import Stored
from adapterkit.hub.sources import FileSource
from adapterkit.registry.errors import DamagedError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_tensor(stored: Stored) -> Tensor:
    """The tensor in its own dtype and shape, on the CPU, its bytes owned by nobody else."""
    if not stored.size:
        return torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
    data = torch.empty(stored.size, dtype=torch.uint8)
    if isinstance(stored.source, FileSource):  # a copy less than by way of bytes
        stored.source.read_into(stored.start, data.numpy().data)
    else:
        data.copy_(torch.frombuffer(bytearray(stored.read()), dtype=torch.uint8))
    return data.view(DTYPES[stored.dtype]).reshape(stored.shape)


class Unread(Mapping[tuple[str, str], Tensor]):
    """The tensors of an adapter as `read_finite` has them, each read when it is asked for. Whoever
    sent them has looked for NaN."""

    def __init__(self, stored: Mapping[tuple[str, str], Stored]) -> None:
        self._stored = stored

    def __getitem__(self, place: tuple[str, str]) -> Tensor:
        return read_tensor(self._stored[place]).float()

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, place: object) -> bool:
        return place in self._stored  # Mapping's own would read it


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; a NaN is both the least and the largest."""
    return not tensor.numel() or all(math.isfinite(end) for end in torch.aminmax(tensor))


def read_finite(adapter: Adapter) -> dict[tuple[str, str], Tensor]:
    """All tensors, float32. DamagedError names each that is not finite, or too large for that."""
    tensors = {place: read_tensor(stored) for place, stored in adapter.tensors.items()}
    tensors = {place: tensor.float() for place, tensor in tensors.items()}
    broken = [
        adapter.tensors[place].key
        for place, tensor in tensors.items()
        if not is_finite(tensor)
    ]
    if broken:
        shown = ", ".join(map(clean, broken[:10]))
        raise DamagedError(f"{adapter.name} holds NaN or Inf values, not finite, in {shown}")
    _require_equal_copies(adapter, tensors)
    return tensors


def _require_equal_copies(adapter: Adapter, tensors: Mapping[tuple[str, str], Tensor]) -> None:
    """What PEFT's wrapper repeats of a saved module must be that module's tensor."""
    for (module, role), tensor in tensors.items():
        parameter = role.removeprefix("wrapper.modules_to_save.")
        saved = tensors.get((module, f"replace.{parameter}"))
        if parameter != role and (saved is None or not torch.equal(saved, tensor)):
            key = clean(adapter.tensors[module, role].key)
            raise DamagedError(f"{adapter.name}: {key} differs from the saved module it repeats")
