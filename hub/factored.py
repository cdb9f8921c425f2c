"""Factors as they are written: of one rank, in one dtype, and what rounding to it costs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapterkit.hub.blend.factors import Factors, norm
from adapterkit.hub.formats.peft_write import Part
from adapterkit.hub.tensors import DTYPES, is_finite
from adapterkit.registry.errors import InvalidError


@dataclass(frozen=True)
class Written:
    """rounding: |rounded change - change| / |change|."""

    a: Part
    b: Part
    rounding: float


def fitting_dtype(every: Collection[Factors], wanted: str, *, exact: bool) -> str:
    """The dtype wanted, or F32 where it has to be exact and is not.

    Raises InvalidError if values are too large for it.
    """
    if exact and wanted != "F32" and not all(_is_exact(f, wanted) for f in every):
        wanted = "F32"
    dtype = DTYPES[wanted]
    if not all(is_finite(t.to(dtype)) for f in every for t in (f.B, f.A)):
        raise InvalidError(f"the factors are too large for {dtype}", hint="--dtype float32")
    return wanted


def _is_exact(factors: Factors, dtype: str) -> bool:
    both = (factors.B, factors.A)
    return all(torch.equal(t.to(DTYPES[dtype]).double(), t) for t in both)


def stored(factors: Factors, rank: int, dtype: str) -> Written:
    """Filled up with zeros to the rank, and rounded."""
    b, a = (t.to(DTYPES[dtype]) for t in (factors.B, factors.A))
    rounding = 0.0 if b is factors.B and a is factors.A else _rounding(factors, b, a)
    if factors.rank < rank:
        n_out, n_in = factors.shape
        wide, high = b.new_zeros(n_out, rank), a.new_zeros(rank, n_in)
        wide[:, : factors.rank], high[: factors.rank] = b, a
        b, a = wide, high
    return Written(part(a, dtype), part(b, dtype), rounding)


def _rounding(factors: Factors, b: Tensor, a: Tensor) -> float:
    """|b a - change| / |change|."""
    # of b a - B A = (b - B) a + B (a - A), as nothing cancels in it
    lost = Factors(
        torch.cat((b.double() - factors.B, factors.B.double()), dim=1),
        torch.cat((a.double(), a.double() - factors.A)),
    )
    size = norm(factors)
    return norm(lost) / size if size else 0.0


def joined(every: Sequence[Factors], rank: int, dtype: str) -> Written:
    """Of all experts in one pair, as PEFT lays it out: A (experts r, in), the expert slow, and B
    (out, r experts), the expert fast."""
    (n_out, n_in), count = every[0].shape, len(every)
    b = torch.zeros(count, n_out, rank, dtype=torch.float64)
    a = torch.zeros(count, rank, n_in, dtype=torch.float64)
    for expert, factors in enumerate(every):
        b[expert, :, : factors.rank], a[expert, : factors.rank] = factors.B, factors.A
    rounding = max(stored(factors, rank, dtype).rounding for factors in every)
    wide = a.reshape(count * rank, n_in).to(DTYPES[dtype])
    tall = b.permute(1, 2, 0).reshape(n_out, rank * count).to(DTYPES[dtype])
    return Written(part(wide, dtype), part(tall, dtype), rounding)


def vector(values: Tensor | None, size: int, dtype: str) -> Part:
    """Zeros where there are none."""
    found = torch.zeros(size) if values is None else values
    return part(found.to(DTYPES[dtype]), dtype)


def part(tensor: Tensor, dtype: str) -> Part:
    data = tensor.contiguous().view(torch.uint8).numpy()
    return Part(dtype, tuple(tensor.shape), data.reshape(-1).data)
