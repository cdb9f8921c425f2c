"""Whether a base holds the weights a sketch was taken of, whatever format it stores them in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from adapterkit.hub.bases.base import Base
from adapterkit.hub.bases.packed import logical_shapes
from adapterkit.hub.bases.sketch import Shape, as_float32, parse_sketch, read_runs, runs
from adapterkit.hub.bases.values import Reader, Values, half_unit, narrowest, read_values

EXACT, SAME_CAST, OTHER, NOT_COMPARED = "exact", "same-cast", "other", "not-compared"


@dataclass(frozen=True)
class Difference:
    """The value of a tensor that is furthest off. position: in the flattened tensor."""

    tensor: str
    position: int
    recorded: float
    found: float
    tolerance: float


@dataclass(frozen=True)
class SketchResult:
    """verdict: `exact`, `same-cast`, `other`, or `not-compared` if nothing could be.
    formats: how the compared tensors are stored in the base. uncompared: tensor -> why."""

    verdict: str
    compared: int
    formats: tuple[str, ...]
    differing: tuple[Difference, ...]
    uncompared: Mapping[str, str]


def compare_sketch(recorded: bytes, base: Base) -> SketchResult:
    """Equal formats must agree exactly; others within what casting or quantizing can change."""
    return compare_values(recorded, partial(read_values, base), logical_shapes(base.tensors))


def compare_values(
    recorded: bytes, reader: Reader, shapes: Mapping[str, Shape] | None = None
) -> SketchResult:
    """The same with values from anywhere, such as a model in memory.

    reader: (tensor, start, count) -> values (`dense_values`, `row_values`, `block_values`), None
    where the tensor cannot be read. shapes: of the tensors there are, None to trust the reader.
    """
    entries = parse_sketch(recorded)
    uncompared = {} if shapes is None else _misfits(entries, shapes)
    formats, verdicts, differing = set(), set(), []
    for name, (shape, values) in entries.items():
        if name in uncompared:
            continue
        found = read_runs(reader, name, shape)
        if found is None:
            uncompared[name] = "not stored as weights that can be read"
            continue
        formats.add(found.format)
        verdict, difference = _compare(name, shape, values, found)
        verdicts.add(verdict)
        differing += [difference] if difference else []
    verdict = next((v for v in (OTHER, SAME_CAST, EXACT) if v in verdicts), NOT_COMPARED)
    compared = len(entries) - len(uncompared)
    return SketchResult(verdict, compared, tuple(sorted(formats)), tuple(differing), uncompared)


def _misfits(
    entries: Mapping[str, tuple[Shape, Values]], shapes: Mapping[str, Shape]
) -> dict[str, str]:
    found = {}
    for name, (shape, _) in entries.items():
        if name not in shapes:
            found[name] = "the base has no such tensor"
        elif tuple(shapes[name]) != shape:
            found[name] = f"the base has shape {list(shapes[name])}, the sketch {list(shape)}"
    return found


def _compare(
    name: str, shape: Shape, recorded: Values, found: Values
) -> tuple[str, Difference | None]:
    if as_float32(recorded.numbers) == as_float32(found.numbers):
        return (EXACT if recorded.format == found.format else SAME_CAST), None
    a, b = recorded, found
    if a.dense and b.dense:
        kinds = [narrowest(side.numbers) for side in (a, b)]
        # Files of one precision that differ were never casts of each other.
        if kinds[0] != kinds[1]:
            a, b = _widened(a, kinds[0]), _widened(b, kinds[1])
    index, gap = max(enumerate(map(partial(_gap, a, b), range(len(a.numbers)))), key=lambda x: x[1])
    if gap <= 0:
        return SAME_CAST, None
    places = [start + i for start, count in runs(name, shape) for i in range(count)]
    width = (a.high[index] - a.low[index] + b.high[index] - b.low[index]) / 2
    numbers = (recorded.numbers[index], found.numbers[index])
    return OTHER, Difference(name, places[index], *numbers, tolerance=width)


def _widened(values: Values, dtype: str) -> Values:
    """Dense values as the interval that a cast to `dtype` takes to each of them."""
    # Bases in bfloat16 were often in float16 before, so that what was cast was rounded twice.
    casts = (dtype, "F16") if dtype == "BF16" else (dtype,)
    errors = [sum(half_unit(number, cast) for cast in casts) for number in values.numbers]
    low = [number - error for number, error in zip(values.numbers, errors, strict=True)]
    high = [number + error for number, error in zip(values.numbers, errors, strict=True)]
    return Values(values.format, values.numbers, low, high)


def _gap(a: Values, b: Values, index: int) -> float:
    """How far two intervals are apart; 0 or less where they meet."""
    first, second = a.numbers[index], b.numbers[index]
    if math.isnan(first) or math.isnan(second):
        return 0.0 if math.isnan(first) and math.isnan(second) else math.inf
    if first == second:
        return 0.0
    gap = max(a.low[index] - b.high[index], b.low[index] - a.high[index])
    return math.inf if math.isnan(gap) else gap
