"""A few weight values of a base, decoded without torch, with the interval each can stand for.

A stored value stands for every value that its format would have stored in the same way: a dense
one for half a unit in its last place, an int8 or 4-bit code for all that lies nearer to it than
to its neighbors. Formats: `packed`; facts: https://huggingface.co/papers/2305.14314, section 3.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import sub

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.packed import State, scales_of, state_of
from adapterkit.hub.findings import clean
from adapterkit.hub.headers import FLOATS, Stored
from adapterkit.registry.errors import DamagedError

# bits of the significand and the exponent of the smallest normal number
PRECISION = {"BF16": (8, -126), "F16": (11, -14), "F32": (24, -126), "F64": (24, -126)}
UNPACK = {"F16": "e", "F32": "f", "F64": "d"}
# What was quantized may have been cast to bfloat16 before: half a unit in its last place.
CAST = 2.0**-8

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0.0, 0.0052083334, 0.16666667, 0.25, 0.33333334, 0.5, 0.6666667, 1.0)
CODES = {"nf4": NF4, "fp4": (*(-x for x in reversed(FP4[1:])), *FP4)}
# Between two codes the nearer one is taken, so a code reaches to the middles around it.
EDGES = {
    method: (-1.0, *((a + b) / 2 for a, b in zip(codes, codes[1:], strict=False)), 1.0)
    for method, codes in CODES.items()
}


@dataclass(frozen=True)
class Values:
    """format: a dense dtype (`BF16`, ...), `nf4`, `fp4` or `int8`.
    low, high: the interval of each number, equal to it where the format is dense."""

    format: str
    numbers: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]

    @property
    def dense(self) -> bool:
        return self.format in PRECISION


Reader = Callable[[str, int, int], Values | None]


def dense_values(dtype: str, numbers: Sequence[float]) -> Values:
    return Values(dtype, numbers, numbers, numbers)


def row_values(numbers: Sequence[float], scales: Sequence[float]) -> Values:
    """int8 values already multiplied out, and the largest absolute value of each one's row."""
    steps = [abs(scale) / 127 / 2 for scale in scales]
    low = [_down(n - s) for n, s in zip(numbers, steps, strict=True)]
    high = [_up(n + s) for n, s in zip(numbers, steps, strict=True)]
    return Values("int8", numbers, low, high)


def block_values(
    method: str, numbers: Sequence[float], scales: Sequence[float] | None = None, error: float = 0.0
) -> Values:
    """4-bit values already multiplied out.

    scales: absmax of each value's block; None takes `numbers` for whole blocks of 64, which always
    hold a code of 1 or -1. error: of the scales themselves, where they are quantized too.
    """
    if scales is None:
        scales = []
        for start in range(0, len(numbers), 64):
            block = numbers[start : start + 64]
            scales += [max(map(abs, block))] * len(block)
    edges = EDGES[method]
    low, high = [], []
    for number, scale in zip(numbers, scales, strict=True):
        place = bisect_left(edges, number / scale if scale else 0.0, 1, len(edges) - 1)
        below, above = edges[place - 1], edges[place]
        # A scale that is off by `error` moves the bounds by as much, times the bound.
        low.append(_down(below * scale) - abs(below) * error)
        high.append(_up(above * scale) + abs(above) * error)
    return Values(method, numbers, low, high)


def _down(bound: float) -> float:
    return bound - abs(bound) * CAST


def _up(bound: float) -> float:
    return bound + abs(bound) * CAST


def narrowest(numbers: Sequence[float]) -> str:
    """The narrowest dense format that holds every number exactly: what it was cast to last."""
    for dtype in ("BF16", "F16"):
        if all(rounded(number, dtype) == number or number != number for number in numbers):
            return dtype
    return "F32"


def rounded(number: float, dtype: str) -> float:
    """`number` to the nearest of `dtype`, ties to even, overflow to infinity."""
    if number == 0 or not math.isfinite(number):
        return number
    bits, smallest = PRECISION[dtype]
    unit = math.ldexp(1.0, max(math.frexp(number)[1] - 1, smallest) - bits + 1)
    return round(number / unit) * unit


def half_unit(number: float, dtype: str) -> float:
    """Half a unit in the last place of `dtype` around `number`: the error of a cast."""
    bits, smallest = PRECISION[dtype]
    exponent = math.frexp(number)[1] - 1 if number and math.isfinite(number) else smallest
    return math.ldexp(1.0, max(exponent, smallest) - bits)


def read_values(base: Base, name: str, start: int, count: int) -> Values | None:
    """Values [start, start + count) of the flattened tensor; None if they are not weights."""
    stored = base.tensors[name]
    state = state_of(base.tensors, name)
    if state is not None:
        return _four_bits(base, name, state, start, count)
    scales = scales_of(base.tensors, name)
    if scales is not None:
        return _int8(stored, scales, start, count)
    if stored.dtype not in FLOATS:
        return None
    return dense_values(stored.dtype, floats(stored, start, count))


def floats(stored: Stored, start: int, count: int) -> tuple[float, ...]:
    """Values of a dense tensor, as float."""
    width = 2 if stored.dtype in ("BF16", "F16") else 8 if stored.dtype == "F64" else 4
    data = stored.source.read(stored.start + start * width, count * width)
    if stored.dtype != "BF16":
        return struct.unpack(f"<{count}{UNPACK[stored.dtype]}", data)
    wide = bytearray(4 * count)  # bfloat16 is the upper half of a float32
    wide[2::4], wide[3::4] = data[0::2], data[1::2]
    return struct.unpack(f"<{count}f", wide)


def _int8(stored: Stored, scales: Stored, start: int, count: int) -> Values:
    width = stored.shape[1]
    first, last = start // width, (start + count - 1) // width
    rows = _finite(scales.key, floats(scales, first, last - first + 1))
    spread = [rows[(start + i) // width - first] for i in range(count)]
    codes = struct.unpack(f"<{count}b", stored.source.read(stored.start + start, count))
    return row_values([c * s / 127 for c, s in zip(codes, spread, strict=True)], spread)


def _four_bits(base: Base, name: str, state: State, start: int, count: int) -> Values:
    first, last = start // 2, (start + count - 1) // 2
    stored = base.tensors[name]
    data = stored.source.read(stored.start + first, last - first + 1)
    nibbles = [half for byte in data for half in (byte >> 4, byte & 15)]
    codes = nibbles[start % 2 : start % 2 + count]
    table = _finite(name, floats(base.tensors[name + ".quant_map"], 0, 16))
    block = start // state.block_size
    n_blocks = (start + count - 1) // state.block_size - block + 1
    scales, error = _scales(base, name, state, block, n_blocks)
    spread = [scales[(start + i) // state.block_size - block] for i in range(count)]
    numbers = [table[c] * s for c, s in zip(codes, spread, strict=True)]
    return block_values(state.method, numbers, spread, error)


def _scales(
    base: Base, name: str, state: State, first: int, count: int
) -> tuple[tuple[float, ...], float]:
    """absmax of blocks, and by how much they can be off because they are quantized themselves."""
    stored = base.tensors[name + ".absmax"]
    if state.nested is None:
        return _finite(name, floats(stored, first, count)), 0.0
    size, offset = state.nested
    table = _finite(name, floats(base.tensors[name + ".nested_quant_map"], 0, 256))
    group = first // size
    n_groups = (first + count - 1) // size - group + 1
    outer = _finite(name, floats(base.tensors[name + ".nested_absmax"], group, n_groups))
    codes = stored.source.read(stored.start + first, count)
    scales = tuple(
        table[code] * outer[(first + i) // size - group] + offset for i, code in enumerate(codes)
    )
    ordered = sorted(table)
    gap = max(map(sub, ordered[1:], ordered))
    return scales, gap / 2 * max(map(abs, outer))


def _finite(name: str, numbers: tuple[float, ...]) -> tuple[float, ...]:
    if not all(map(math.isfinite, numbers)):
        raise DamagedError(f"{clean(name)} has quantization constants that are not finite numbers")
    return numbers
