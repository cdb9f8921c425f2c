"""A sketch: a few values of each tensor, by which the same weights are known after a cast.

Two runs of 64 values a tensor, aligned to 64 (a whole block of a 4-bit weight), at places derived
from the tensor's name and shape, so that reading them from a far base takes two short ranges.
Stored as safetensors: name -> F32, and for quantized weights `name:low` and `name:high`.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.packed import auxiliary, logical_shapes
from adapterkit.hub.bases.values import Reader, Values, floats, read_values
from adapterkit.hub.findings import clean
from adapterkit.hub.headers import read_header
from adapterkit.registry.errors import DamagedError, NotFoundError
from adapterkit.registry.strictjson import canonical, parse_object

VERSION = "1"
RUN = 64
NAME = "the sketch"

Shape = tuple[int, ...]


def runs(name: str, shape: Shape) -> list[tuple[int, int]]:
    """(start, count) of the values a sketch holds of a tensor; all of a small one."""
    size = math.prod(shape)
    if size < 2 * RUN:
        return [(0, size)] if size else []
    digest = hashlib.sha256(canonical([name, list(shape)])).digest()
    blocks = size // RUN
    first, second = (int.from_bytes(digest[i : i + 8], "big") % blocks for i in (0, 8))
    if first == second:
        second = (second + 1) % blocks
    return [(RUN * block, RUN) for block in sorted((first, second))]


def sketch(base: Base, names: Iterable[str] | None = None) -> bytes:
    """Values of the named checkpoint tensors, of all weights by default.

    Equal weights have equal bytes. Tensors that hold no weights (integers) are left out.
    Raises NotFoundError if the base has no such tensor.
    """
    shapes = logical_shapes(base.tensors)
    wanted = sorted(set(shapes if names is None else names) - auxiliary(base.tensors))
    absent = [name for name in wanted if name not in shapes]
    if absent:
        raise NotFoundError(f"{clean(base.name)} has no tensor {clean(', '.join(absent[:5]))}")
    entries: dict[str, Values] = {}
    for name in wanted:
        values = read_runs(partial(read_values, base), name, shapes[name])
        if values is not None:
            entries[name] = values
    return _write(entries, {name: shapes[name] for name in entries})


def read_runs(reader: Reader, name: str, shape: Shape) -> Values | None:
    found = [reader(name, start, count) for start, count in runs(name, shape)]
    parts = [part for part in found if part is not None]
    if not parts or len(parts) < len(found):
        return None
    numbers, low, high = (
        [x for part in column for x in part]
        for column in zip(*((p.numbers, p.low, p.high) for p in parts), strict=True)
    )
    return Values(parts[0].format, numbers, low, high)


def _write(entries: Mapping[str, Values], shapes: Mapping[str, Shape]) -> bytes:
    columns: dict[str, bytes] = {}
    for name, values in entries.items():
        columns[name] = as_float32(values.numbers)
        if not values.dense:
            columns[f"{name}:low"] = as_float32(values.low)
            columns[f"{name}:high"] = as_float32(values.high)
    header: dict[str, object] = {
        "__metadata__": {
            "version": VERSION,
            "shapes": canonical({name: list(shape) for name, shape in shapes.items()}).decode(),
            "formats": canonical({name: v.format for name, v in entries.items()}).decode(),
        }
    }
    place = 0
    for name in sorted(columns):
        end = place + len(columns[name])
        count = len(columns[name]) // 4
        header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    body = b"".join(columns[name] for name in sorted(columns))
    return len(text).to_bytes(8, "little") + text + body


def as_float32(numbers: Iterable[float]) -> bytes:
    """Little-endian; what is too large becomes infinite."""
    packed = array("f", numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


@dataclass(frozen=True)
class _Bytes:
    name: str
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, start: int, size: int) -> bytes:
        if start + size > len(self.data):
            raise DamagedError(f"{self.name} is truncated: {len(self.data)} bytes")
        return self.data[start : start + size]


def parse_sketch(data: bytes) -> dict[str, tuple[Shape, Values]]:
    """What a sketch holds: tensor -> (shape, values). Raises DamagedError if it is malformed."""
    header = read_header(_Bytes(NAME, data))
    if header.metadata.get("version") != VERSION:
        version = clean(repr(header.metadata.get("version")))
        raise DamagedError(f"{NAME} has version {version}, expected {VERSION}")
    shapes = parse_object(header.metadata.get("shapes", "").encode(), f"{NAME}'s shapes")
    formats = parse_object(header.metadata.get("formats", "").encode(), f"{NAME}'s formats")
    found = {}
    for name, shape in shapes.items():
        column = header.tensors.get(name)
        n_values = sum(count for _, count in runs(name, _shape(name, shape)))
        if column is None or column.dtype != "F32" or column.shape != (n_values,):
            raise DamagedError(f"{NAME} has no F32 [{n_values}] of {clean(name)}, found {column}")
        low = header.tensors.get(f"{name}:low", column)
        high = header.tensors.get(f"{name}:high", column)
        if not low.shape == high.shape == column.shape:
            raise DamagedError(f"{NAME} has bounds of another length than {clean(name)}")
        parts = (floats(part, 0, n_values) for part in (column, low, high))
        found[name] = (tuple(shape), Values(str(formats.get(name)), *parts))
    return found


def _shape(name: str, shape: object) -> Shape:
    if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 1 << 48 for n in shape):
        raise DamagedError(f"{NAME} has the shape {clean(repr(shape))} of {clean(name)}")
    return tuple(shape)
