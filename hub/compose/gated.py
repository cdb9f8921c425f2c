"""Low-rank updates behind gates that look at the input: folded once at activation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adapterkit.hub.primitives import GatedLowRank


@dataclass(frozen=True)
class Gated:
    """B (c * (A x)) with c (R) = scale * gates[index].

    A (R, in), B (out, R); gates (K): of the mean over positions, rows and biases (K, in) and (K);
    index, scale (R): the gate of each rank, and the weight of its adapter.
    """

    A: Tensor
    B: Tensor
    rows: Tensor
    biases: Tensor
    index: Tensor
    scale: Tensor

    def run(self, x: Tensor) -> Tensor:
        """(..., out) of x (..., positions, in)."""
        gates = functional.linear(x.to(self.rows.dtype), self.rows, self.biases).sigmoid()
        gates = gates.mean(-2, keepdim=True) if gates.ndim > 2 else gates
        z = functional.linear(x.to(self.A.dtype), self.A)
        c = gates[..., self.index] * self.scale
        return functional.linear(z * c.to(z.dtype), self.B)


def fold(updates: Iterable[tuple[float, GatedLowRank]]) -> Gated | None:
    """All of a module's, side by side; None if there are none."""
    given = list(updates)
    if not given:
        return None
    index, scale, before = [], [], 0
    for weight, low in given:
        rank, count = len(low.A), len(low.gate)
        own = torch.arange(before, before + count, device=low.A.device)
        index.append(own.repeat_interleave(rank // count))
        scale.append(low.A.new_full((rank,), weight))
        before += count
    return Gated(
        A=torch.cat([low.A for _, low in given]),
        B=torch.cat([low.B for _, low in given], dim=1),
        rows=torch.cat([low.gate for _, low in given]),
        biases=torch.cat([low.gate_bias for _, low in given]),
        index=torch.cat(index),
        scale=torch.cat(scale),
    )
