"""Tensors in a file that torch.save wrote, found without torch and without running anything.

The archive of torch >= 1.6 is a zip of `data.pkl` and one member per storage; before, it was five
pickles and the storages one after the other.  torch 2.13 `torch/serialization.py`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterkit.hub.findings import clean, several
from adapterkit.hub.headers import DTYPE_BITS, MAX_VALUES, Header, Stored, refuse_other_formats
from adapterkit.hub.pickled import read_pickle
from adapterkit.hub.sources import ByteSource
from adapterkit.hub.storedzip import LOCAL, members
from adapterkit.hub.strided import Strided
from adapterkit.hub.torchnames import Storage, View
from adapterkit.registry.errors import DamagedError

MAX_PICKLE = 1 << 25
MAX_ENTRIES = 200_000
MAX_DEPTH = 32
MAX_KEY = 4096
# Views share storages, as tied tensors do; together they may be this much larger than the file.
MAX_SHARING = 64
PICKLE = b"\x80"
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
Range = tuple[int, int]


@dataclass(frozen=True)
class TorchFile(Header):
    """values: what stands beside the tensors: text, numbers, lists of them, by dotted key."""

    values: Mapping[str, Any] = field(default_factory=dict)


def read_torch(source: ByteSource) -> TorchFile:
    """Tensors by dotted key ("model_state_dict.x"), and the plain values beside them.

    Raises DamagedError that names the file and what is wrong, or what it holds that is no tensor.
    """
    prefix = source.read(0, min(source.size, 64))
    name = clean(source.name)
    if prefix.startswith(LOCAL):
        value, storages = _archive(source, name)
    elif prefix.startswith(PICKLE):
        value, storages = _legacy(source, name)
    else:
        refuse_other_formats(prefix, name, source.size)
        raise DamagedError(
            f"{name} is not a file of torch.save: it is neither a zip archive nor a pickle",
            hint="a safetensors file needs a name that ends in .safetensors",
        )
    if not isinstance(value, dict):
        raise DamagedError(f"{name} holds a {type(value).__name__}, expected a dictionary")
    return _Reader(source, name, storages).read(value)


def _archive(source: ByteSource, name: str) -> tuple[Any, Mapping[str, Range]]:
    found = members(source)
    pickles = [path for path in found if path.rpartition("/")[2] == "data.pkl"]
    if len(pickles) != 1:
        raise DamagedError(f"{name} is an archive with {len(pickles)} data.pkl, expected one")
    root = pickles[0].removesuffix("data.pkl")
    start, stop = found.get(f"{root}byteorder", (0, 0))
    if stop - start > 16 or source.read(start, stop - start) not in (b"", b"little"):
        raise DamagedError(f"{name} was written on a big-endian machine, expected little-endian")
    start, stop = found[pickles[0]]
    if stop - start > MAX_PICKLE:
        raise DamagedError(
            f"{name} has a data.pkl of {stop - start} bytes, expected {MAX_PICKLE} at most"
        )
    storages: dict[str, Storage] = {}
    value = read_pickle(io.BytesIO(source.read(start, stop - start)), name, storages)
    places = {key: found.get(f"{root}data/{key}") for key in storages}
    return value, _checked(name, storages, places)


def _legacy(source: ByteSource, name: str) -> tuple[Any, Mapping[str, Range]]:
    file = io.BytesIO(source.read(0, min(source.size, MAX_PICKLE)))
    storages: dict[str, Storage] = {}

    def load() -> Any:
        return read_pickle(file, name, storages)

    first = load()
    if first != MAGIC or load() != PROTOCOL:
        raise DamagedError(f"{name} is a pickle, but none that torch.save wrote",)
    machine, value, keys = load(), load(), load()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise DamagedError(f"{name} was written on a big-endian machine, expected little-endian")
    named = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not named or sorted(keys) != sorted(storages):
        raise DamagedError(f"{name} has a damaged list of storages")
    places: dict[str, Range | None] = {}
    at = file.tell()
    for key in keys:
        start = at + 8  # behind the number of elements
        stop = start + storages[key].numel * _width(storages[key].dtype)
        places[key] = (start, stop) if stop <= source.size else None
        at = stop
    return value, _checked(name, storages, places)


def _checked(
    name: str, storages: Mapping[str, Storage], places: Mapping[str, Range | None]
) -> dict[str, Range]:
    """The places; raises for a storage that is missing or of another size than the pickle says."""
    faults = []
    for key, storage in storages.items():
        start, stop = places[key] or (0, 0)
        size = storage.numel * _width(storage.dtype)
        if stop - start != size:
            faults.append(f"storage {clean(key)} has {stop - start} bytes, expected {size}")
    if faults:
        raise DamagedError(f"{name} is damaged: {several(faults)}")
    return {key: place for key, place in places.items() if place is not None}


def _width(dtype: str) -> int:
    return DTYPE_BITS[dtype] // 8


class _Reader:
    """Flattens the value of a pickle; every fault is collected, then raised at once."""

    def __init__(self, source: ByteSource, name: str, storages: Mapping[str, Range]) -> None:
        self.source, self.name, self.storages = source, name, storages
        self.tensors: dict[str, Stored] = {}
        self.values: dict[str, Any] = {}
        self.faults: list[str] = []
        self.entries = self.bytes = 0

    def read(self, value: dict[Any, Any]) -> TorchFile:
        self.walk("", value, 0)
        if self.faults:
            raise DamagedError(f"{self.name} is damaged: {several(self.faults)}")
        return TorchFile(self.tensors, {}, self.values)

    def walk(self, path: str, value: Any, depth: int) -> None:
        self.entries += 1
        if depth > MAX_DEPTH or self.entries > MAX_ENTRIES or len(path) > MAX_KEY:
            raise DamagedError(
                f"{self.name} nests deeper than {MAX_DEPTH}, has names longer than {MAX_KEY} or"
                f" more than {MAX_ENTRIES} entries"
            )
        if path in self.tensors or path in self.values:
            self.faults.append(f"two entries are called {clean(path)}")
        elif isinstance(value, View):
            self.tensor(path, value)
        elif children := _children(value):
            for name, child in children():
                self.walk(f"{path}.{name}" if path else str(name), child, depth + 1)
        elif isinstance(value, list | tuple):
            self.entries += len(value)
            self.values[path] = list(value)
        elif _is_plain(value):
            self.values[path] = value
        else:
            self.faults.append(f"{clean(path)} is a {type(value).__name__}, not a tensor")

    def tensor(self, path: str, view: View) -> None:
        start, stop = self.storages[view.storage.key]
        width = _width(view.dtype)
        reach = sum((n - 1) * s for n, s in zip(view.shape, view.stride, strict=True))
        count = 0 if 0 in view.shape else _product(view.shape)
        end = (view.offset + reach + 1) * width if count else 0
        size = count * width
        if end > stop - start or size > stop - start or (stop - start) % width:
            self.faults.append(
                f"{clean(path)} of shape {clean(str(view.shape))} and stride"
                f" {clean(str(view.stride))} is larger than its storage of {stop - start} bytes"
            )
            return
        self.bytes += size
        if self.bytes > MAX_SHARING * self.source.size:
            raise DamagedError(f"{self.name} has tensors that are larger together than the file")
        at = start + (view.offset * width if count else 0)
        if _is_run(view) or not count:
            self.tensors[path] = Stored(path, view.dtype, view.shape, self.source, at, at + size)
        else:
            part = (start, stop, width, view.offset, view.shape, view.stride)
            source = Strided(self.source, *part, f"{self.source.name}, {path}", size)
            self.tensors[path] = Stored(path, view.dtype, view.shape, source, 0, size)


def _children(value: Any) -> Callable[[], Iterator[tuple[Any, Any]]] | None:
    """What is walked into: a dictionary that holds something, a list of more than plain values."""
    if isinstance(value, dict) and value:
        return lambda: iter(value.items())
    if isinstance(value, list | tuple) and not all(map(_is_plain, value)):
        return lambda: iter(enumerate(value))
    return None


def _is_plain(value: Any) -> bool:
    return value is None or value == {} or isinstance(value, str | int | float)


def _product(shape: tuple[int, ...]) -> int:
    """Values of the shape, or more than any file has."""
    count = 1
    for size in shape:
        count *= size
        if count >= MAX_VALUES:
            return MAX_VALUES
    return count


def _is_run(view: View) -> bool:
    """Whether its elements lie one after the other."""
    step = 1
    for size, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
