"""Rows that have one adapter at most, each multiplied with the factors of its own alone.

`torch.nn.functional.grouped_mm` takes tokens sorted by slot, and where those of each slot stop. It
has a kernel for bf16 on CUDA devices of capability 9 and 10, of sizes that are multiples of 16
bytes; elsewhere it is a loop that copies the stops to the host, which no CUDA graph may.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from adapterkit.hub.compose.here import lasting

# What of each mix lies where in a bank: (start, stop, weight * scale)
Spans = tuple[tuple[tuple[int, int, float], ...], ...]
CAPABILITIES = (9, 10)
# All factors side by side cost a token slots * rank instead of rank. Up to some 300 tokens a
# product takes the time of reading its factors, which is the same either way, and up to a width of
# 128 it fills one tile: below either, the two products without sorting are the faster. Reckoned
# from the H100's 990 TFLOP/s and 3.35 TB/s, not measured.
TOKENS, WIDTH = 512, 256
ALIGNED = 8


@dataclass(frozen=True)
class Slots:
    """All of one rank, side by side. places: of each mix; scales: (count, 1, 1)."""

    count: int
    rank: int
    places: tuple[int | None, ...]
    scales: Tensor


def slots_of(
    spans: Spans, place: Mapping[int, int], width: int, device: torch.device
) -> Slots | None:
    """Where every mix is one adapter at most, and all have one rank."""
    if any(len(made) > 1 for made in spans):
        return None
    single = [made[0] for made in spans if made]
    ranks = {stop - start for start, stop, _ in single}
    if len(ranks) > 1 or len({start for start, _, _ in single}) < len(single):
        return None
    rank = ranks.pop()
    if width != rank * len(single) or any(place[start] % rank for start, _, _ in single):
        return None
    places = tuple(place[made[0][0]] // rank if made else None for made in spans)
    scales = torch.zeros(len(single), 1, 1)
    for start, _, scale in single:
        scales[place[start] // rank] = scale
    return Slots(len(single), rank, places, scales.to(device))


@dataclass(frozen=True)
class Groups:
    """The rows of an input that have an adapter, by slots. order (n): which; ends (slots) int32:
    where each slot's stop; scales (n, 1)."""

    order: Tensor
    ends: Tensor
    scales: Tensor

    @classmethod
    def of(cls, slots: Sequence[int | None], scales: Tensor) -> Groups | None:
        """slots: of each row, None for the base; scales (slots, ...): on the device. None if no row
        has any."""
        pairs = sorted((slot, row) for row, slot in enumerate(slots) if slot is not None)
        if not pairs:
            return None
        mine, order = zip(*pairs, strict=True)
        ends = [bisect_right(mine, slot) for slot in range(len(scales))]
        device = scales.device
        with lasting():
            return cls(
                torch.tensor(order, device=device),
                torch.tensor(ends, dtype=torch.int32, device=device),
                scales.flatten()[torch.tensor(mine, device=device)][:, None],
            )

    def added(self, x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """y plus what each row's factors make of it.  x (rows, ..., in), y (rows, ..., out),
        a (slots, r, in), b (slots, r, out)."""
        mine = x[self.order].to(a.dtype).reshape(-1, x.shape[-1])
        ends = self.ends * (len(mine) // len(self.order))
        z = functional.grouped_mm(mine, a.mT, offs=ends)
        z.view(len(self.order), -1).mul_(self.scales)
        made = functional.grouped_mm(z, b, offs=ends)
        total = y[self.order] + made.view(-1, *y.shape[1:])
        return y.to(total.dtype).index_copy(0, self.order, total)


def pays(a: Tensor, b: Tensor, rank: int) -> bool:
    """Whether there is a kernel for such factors, a (R, in), b (R, out), and it pays for long
    inputs."""
    aligned = all(size % ALIGNED == 0 for size in (rank, a.shape[-1], b.shape[-1]))
    if not aligned or len(a) < WIDTH or len(a) == rank:
        return False
    return a.is_cuda and a.dtype == b.dtype == torch.bfloat16 and _has_kernel(a.device)


def _has_kernel(device: torch.device) -> bool:
    if torch.version.hip is not None or sys.platform == "win32":
        return False
    return torch.cuda.get_device_capability(device)[0] in CAPABILITIES
