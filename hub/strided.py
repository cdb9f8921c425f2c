"""Tensors that are no run of bytes: gathered out of one, in the order of their elements."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from adapterkit.hub.headers import DTYPE_BITS, Stored
from adapterkit.hub.sources import ByteSource

# memoryview format of an element, by its bytes
ELEMENTS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
Axis = tuple[int, int]


@dataclass(frozen=True)
class Strided:
    """Elements of the bytes [start, stop) of a source. offset and stride count elements."""

    source: ByteSource
    start: int
    stop: int
    width: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    name: str
    size: int

    def read(self, start: int, size: int) -> bytes:
        data = self.source.read(self.start, self.stop - self.start)
        elements = memoryview(data).cast(ELEMENTS[self.width])
        axes = [pair for pair in zip(self.shape, self.stride, strict=True) if pair[0] > 1]
        *outer, inner = axes or [(1, 1)]
        row = inner[0] * self.width
        first, last = start // row, -(-(start + size) // row)
        rows = b"".join(self._row(elements, outer, index, inner) for index in range(first, last))
        return rows[start - first * row :][:size]

    def _row(self, elements: memoryview, outer: list[Axis], index: int, inner: Axis) -> bytes:
        at = self.offset
        for count, step in reversed(outer):
            index, place = divmod(index, count)
            at += place * step
        count, step = inner
        if step == 0:
            return elements[at : at + 1].tobytes() * count
        return elements[at : at + (count - 1) * step + 1 : step].tobytes()


def transposed(stored: Stored) -> Stored:
    """A matrix with rows and columns exchanged; anything else than a matrix as it is."""
    if len(stored.shape) != 2 or not stored.size:
        return stored
    rows, columns = stored.shape
    shape, stride = (columns, rows), (1, columns)
    width, name = DTYPE_BITS[stored.dtype] // 8, stored.source.name
    part = (stored.start, stored.stop, width, 0, shape, stride)
    source = Strided(stored.source, *part, name, stored.size)
    return replace(stored, shape=shape, source=source, start=0, stop=stored.size)
