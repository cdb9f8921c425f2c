"""The safetensors header, read strictly and without the tensors.

Format: 8 bytes little-endian header length, that many bytes of JSON, then the data; every byte of
the data belongs to exactly one tensor (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from adapterkit.hub.findings import clean, several
from adapterkit.hub.sources import ByteSource
from adapterkit.registry.errors import DamagedError
from adapterkit.registry.strictjson import is_text, loads

# bits, since the format has types smaller than a byte
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
# The limit of the safetensors library itself.
MAX_HEADER = 100_000_000
# More values than any file can hold.
MAX_VALUES = 1 << 48
LFS_MARK = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: safetensors dtype name, shape, its bytes [start, stop) of `source`."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    source: ByteSource
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def read(self) -> bytes:
        return self.source.read(self.start, self.size)

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Header:
    """Tensors by key in file order, and the file's `__metadata__`."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_header(source: ByteSource) -> Header:
    """The header of a safetensors file. Raises DamagedError naming the file and every fault."""
    name = clean(source.name)
    prefix = source.read(0, min(source.size, 64))
    refuse_other_formats(prefix, name, source.size)
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER or length < 2:
        raise DamagedError(
            f"{name} is not a safetensors file: the header length it declares is {length} bytes"
        )
    if 8 + length > source.size:
        raise DamagedError(
            f"{name} has a truncated header: {length} bytes declared, the file has {source.size}"
        )
    entries, metadata = _parse(source.read(8, length), name)
    faults: list[str] = []
    tensors: dict[str, Stored] = {}
    for key, entry in entries.items():
        stored = _tensor(key, entry, source, 8 + length, faults)
        if stored is not None:
            tensors[key] = stored
    faults.extend(_layout(tensors.values(), 8 + length, source.size) if not faults else [])
    if faults:
        raise DamagedError(f"{name} has a damaged header: {several(faults)}")
    return Header(tensors, metadata)


def refuse_other_formats(prefix: bytes, name: str, size: int) -> None:
    start = prefix.lstrip().lower()
    if size == 0:
        raise DamagedError(f"{name} is empty: 0 bytes")
    if prefix.startswith(LFS_MARK):
        raise DamagedError(f"{name} is a git-LFS pointer, not the weights", hint="git lfs pull")
    if start.startswith((b"<!doctype", b"<html")):
        raise DamagedError(f"{name} is an HTML page, not a safetensors file")
    # A header length may start with the same two bytes as a pickle, but never with all eight.
    is_length = size >= 8 and int.from_bytes(prefix[:8], "little") <= MAX_HEADER
    pickled = prefix[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04") and not is_length
    if prefix.startswith(b"PK\x03\x04") or pickled:
        raise DamagedError(
            f"{name} is a pickle or torch archive, not a safetensors file (no safetensors header)",
            hint="save it again with safetensors; plain tensors are read from a .bin too",
        )
    if size < 8:
        raise DamagedError(f"{name} has {size} bytes: truncated before the end of its header")


def _parse(data: bytes, name: str) -> tuple[dict[str, Any], dict[str, str]]:
    repeated: list[str] = []
    try:
        value = loads(data.decode("utf-8"), repeated)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{name} has a header that is not JSON: {clean(str(error))}") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{name} has a header that is not a JSON object")
    if repeated:
        shown = ", ".join(clean(key) for key in repeated[:20])
        raise DamagedError(f"{name} has duplicate keys in its header: {shown}")
    if b"\\u" in data and not is_text(value):
        raise DamagedError(f"{name} has a header that holds half of a surrogate pair, not text")
    metadata = value.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DamagedError(
            f"{name} has a header whose __metadata__ maps strings to something else than strings"
        )
    return value, metadata


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _fits(sizes: list[int]) -> bool:
    """Whether the sizes and their product are far from 64 bits; stops where they are not, as the
    product of all of a long list would take forever."""
    product = 1
    for size in sizes:
        product *= size or 1
        if product >= MAX_VALUES:
            return False
    return True


def _tensor(
    key: str, entry: object, source: ByteSource, data: int, faults: list[str]
) -> Stored | None:
    shown = clean(key)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        faults.append(f"{shown} is not a tensor entry of dtype, shape and data_offsets")
        return None
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    found = [*_form_faults(dtype, shape), *_range_faults(offsets, data, source.size)]
    faults.extend(f"{shown} has {fault}" for fault in found)
    if found:
        return None
    start, stop = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != (stop - start) * 8:
        faults.append(
            f"{shown} has shape {clean(str(shape))} of {dtype}, {bits / 8:.16g} bytes, but its"
            f" data_offsets hold {stop - start} bytes in size"
        )
        return None
    return Stored(key, dtype, tuple(shape), source, data + start, data + stop)


def _form_faults(dtype: object, shape: object) -> list[str]:
    faults = []
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        faults.append(f"an unknown dtype {clean(repr(dtype))}")
    if not isinstance(shape, list) or not all(map(_count, shape)):
        faults.append(f"a shape with a negative or non-integer size: {clean(repr(shape))}")
    elif not _fits(shape):
        faults.append(f"a shape whose size overflows: {clean(repr(shape))}")
    return faults


def _range_faults(offsets: object, data: int, size: int) -> list[str]:
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_count, offsets))):
        return [f"malformed data_offsets {clean(repr(offsets))}"]
    if max(offsets) >= 1 << 63:
        return [f"data_offsets out of range: {clean(repr(offsets))}"]
    if offsets[0] > offsets[1]:
        return [f"data_offsets that end before they start: {offsets}"]
    if data + offsets[1] > size:
        return [
            f"data_offsets {offsets} out of range: the file is truncated, expected at least"
            f" {data + offsets[1]} bytes, actual size {size}"
        ]
    return []


def _layout(tensors: Iterable[Stored], data: int, size: int) -> list[str]:
    """Faults of the byte ranges as a whole: overlaps, holes, and bytes after the last tensor."""
    faults = []
    end = data
    for tensor in sorted(tensors, key=lambda t: (t.start, t.stop)):
        shown = clean(tensor.key)
        if tensor.start < end:
            faults.append(f"the data_offsets of {shown} overlap those of the tensor before it")
        elif tensor.start > end:
            faults.append(f"a hole of {tensor.start - end} bytes before the offset of {shown}")
        end = max(end, tensor.stop)
    if end < size:
        faults.append(f"trailing bytes: the tensors end at offset {end}, the file size is {size}")
    return faults
