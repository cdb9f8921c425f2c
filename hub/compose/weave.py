"""A composed setup, for one module with a weight: what acts on which rows of the batch.

A stack of low-rank updates is one: y = W x + s2 B2 A2 (s1 B1 A1 x), as the second reads what the
first gives (adapters 1.3 `methods/lora.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from adapterkit.hub.compose.blocks import Average, BatchSplit, Block, Parallel, Setup, Stack
from adapterkit.hub.compose.plan import Plan, Weighted
from adapterkit.hub.primitives import Gain, GatedLowRank, LowRank, OutputGain, Replace
from adapterkit.registry.errors import InvalidError


@dataclass(frozen=True)
class Part:
    """Updates of a share of the batch."""

    share: Fraction
    updates: tuple[Weighted, ...]


# Each adapter's own updates of the module.
Own = Mapping[str, Sequence[Weighted]]


def parts_of(active: Setup, own: Own) -> list[Part]:
    """What is active on a module. A plain mapping of weights is a sum."""
    if active.is_composed and active.block is not None:
        return woven(active.block, own)
    return [Part(Fraction(1), tuple(update for made in own.values() for update in made))]


def whole_of(parts: Sequence[Part]) -> tuple[Weighted, ...]:
    """The updates, where they have to be the same for the whole batch."""
    if len(parts) > 1:
        raise InvalidError("experts take no setup that differs by rows of the batch")
    return parts[0].updates


def woven(child: str | Block, own: Own) -> list[Part]:
    """The parts of the batch in order. Raises InvalidError for what cannot be composed so."""
    if isinstance(child, str):
        return [Part(Fraction(1), tuple(own.get(child, ())))]
    if not any(own.get(name) for name in child):
        return [Part(Fraction(1), ())]
    parts = [woven(each, own) for each in child.children]
    if isinstance(child, Parallel):
        return list(_joined(parts, [Fraction(1, len(parts))] * len(parts)))
    if isinstance(child, BatchSplit):
        total = sum(child.batch_sizes)
        return list(_joined(parts, [Fraction(size, total) for size in child.batch_sizes]))
    if isinstance(child, Stack):
        return _aligned(child, parts, lambda stages: _stacked(child, stages))
    if isinstance(child, Average):
        return _aligned(child, parts, lambda found: _averaged(child, found))
    acting = ", ".join(name for name in dict.fromkeys(child) if own.get(name))
    raise InvalidError(f"{child!r} is of bottlenecks, but {acting} changes modules")


def _joined(parts: Sequence[Sequence[Part]], shares: Sequence[Fraction]) -> Iterator[Part]:
    for share, inner in zip(shares, parts, strict=True):
        yield from (Part(share * part.share, part.updates) for part in inner)


Stages = Sequence[tuple[Weighted, ...]]


def _aligned(
    block: Block, parts: Sequence[Sequence[Part]], make: Callable[[Stages], Sequence[Weighted]]
) -> list[Part]:
    """One after the other on the same rows: those that split them have to split them alike."""
    shares = {tuple(part.share for part in inner) for inner in parts if len(inner) > 1}
    if len(shares) > 1:
        raise InvalidError(f"{block!r} splits the batch in different ways")
    split = shares.pop() if shares else (Fraction(1),)
    return [
        Part(share, tuple(make([inner[n % len(inner)].updates for inner in parts])))
        for n, share in enumerate(split)
    ]


def _stacked(block: Stack, stages: Stages) -> list[Weighted]:
    low = [stage for stage in stages if any(map(_is_low, stage))]
    rest = _last_replaced([stage for stage in stages if not any(map(_is_low, stage))])
    if len(low) < 2:
        return [*chain.from_iterable(low), *rest]
    for stage in low:
        only = stage[0].primitive
        if len(stage) > 1 or not isinstance(only, LowRank) or only.A.ndim > 2:
            names = ", ".join(type(each.primitive).__name__ for each in stage)
            raise InvalidError(f"{block!r} stacks updates of one module, of {names} among them")
    total = low[0][0]
    for (after,) in low[1:]:
        total = _after(block, total, after)
    return [total, *rest]


def _is_low(update: Weighted) -> bool:
    return isinstance(update.primitive, LowRank | GatedLowRank)


def _after(block: Stack, first: Weighted, second: Weighted) -> Weighted:
    """s2 B2 A2 (s1 B1 A1 x), of the second's rank; the product is made in float32."""
    a, b = first.primitive, second.primitive
    if not (isinstance(a, LowRank) and isinstance(b, LowRank)):
        raise InvalidError(f"{block!r} stacks what is not of low rank")
    if a.B.shape[0] != b.A.shape[1]:
        sizes = f"{a.B.shape[0]} outputs and {b.A.shape[1]} inputs"
        raise InvalidError(f"{block!r} stacks updates of a module with {sizes}")
    inner = b.A.float() @ _rows(a.B.float(), a.out_scale) * (first.weight * a.scale)
    down = inner @ _rows(a.A.float(), a.rank_scale)
    up = _rows(b.B, b.out_scale)
    made = LowRank(up, down.to(b.A.dtype), b.scale, rank_scale=b.rank_scale)
    return Weighted(second.weight, made)


def _rows(matrix: Tensor, scale: Tensor | None) -> Tensor:
    return matrix if scale is None else matrix * scale[:, None].to(matrix.dtype)


def _last_replaced(stages: Stages) -> list[Weighted]:
    """A stack has the head of its last adapter that brings one, as the library has it."""
    found: list[Weighted] = []
    taken: set[str] = set()
    for stage in reversed(stages):
        kept = [w for w in stage if not (_replaces(w) and _replaces(w) in taken)]
        taken |= {name for name in map(_replaces, stage) if name}
        found = kept + found
    return found


def _replaces(update: Weighted) -> str:
    new = update.primitive
    return new.name if isinstance(new, Replace) and new.rows is None else ""


def _averaged(block: Average, found: Stages) -> list[Weighted]:
    scaled = [
        Weighted(weight * update.weight, update.primitive)
        for weight, stage in zip(block.weights, found, strict=True)
        for update in stage
    ]
    gains = [update for update in scaled if isinstance(update.primitive, Gain)]
    if not gains or len(scaled) == 1:
        return scaled
    factors = [u.primitive for u in gains if isinstance(u.primitive, OutputGain)]
    if len(factors) < len(scaled):
        raise InvalidError(f"{block!r} averages gains of one module with what is none")
    terms = [u.weight * (gain.l - 1) for u, gain in zip(gains, factors, strict=True)]
    return [Weighted(1.0, OutputGain(1 + torch.stack(terms).sum(0)))]


@dataclass(frozen=True)
class ByRows:
    """A plan for each share of the batch; None is the base."""

    parts: tuple[tuple[Fraction, Plan | None], ...]

    def run(self, module: Any, original: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        sizes = [share * len(x) for share, _ in self.parts]
        if any(size.denominator > 1 for size in sizes):
            shown = ", ".join(str(share) for share, _ in self.parts)
            name = type(module).__name__
            raise InvalidError(f"{len(x)} rows of the input of {name} do not split into {shown}")
        pieces = torch.split(x, [int(size) for size in sizes])
        made = [
            original(piece) if plan is None else plan.run(module, original, (piece,), {})
            for (_, plan), piece in zip(self.parts, pieces, strict=True)
        ]
        if not isinstance(made[0], tuple):
            return torch.cat(made)
        return tuple(torch.cat(each) for each in zip(*made, strict=True))  # a router's three
