"""Where compiled code and CUDA graphs look: memory that stays as it is, whatever is active.

Factors that are active are copied into it at activation, so that switching, swapping and routing
change no pointer and no shape: nothing is compiled again, and a CUDA graph stays right.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapterkit.hub.compose.bank import Bank, Banked
from adapterkit.hub.compose.patch import Patch
from adapterkit.hub.compose.plan import Weighted, banked
from adapterkit.hub.compose.products import expand, project
from adapterkit.hub.compose.routes import Routes
from adapterkit.hub.compose.rows import UNKNOWN
from adapterkit.registry.errors import AdapterWarning, InvalidError

MAX_ROWS = 1024


@dataclass(eq=False)
class Board:
    """What all modules share. of: for each row of the batch the number of its mix, (MAX_ROWS), all
    the first where nothing is routed; rows: how many are, 0 for no routing."""

    of: Tensor
    rows: int = 0

    def set(self, of: Sequence[int] | None) -> None:
        """None for no routing."""
        if of is not None and len(of) > MAX_ROWS:
            raise InvalidError(f"{len(of)} rows are routed, {MAX_ROWS} at most where compiled")
        if of is not None:
            self.of[: len(of)] = torch.tensor(of, device=self.of.device)
        elif self.rows:
            self.of.zero_()
        self.rows = 0 if of is None else len(of)

    def index(self, rows: int, path: str) -> Tensor | None:
        """The mix of each row of a module's input, which has one for each that is routed, or for
        each of its beams or tokens; None where all have the first.

        A recorded graph looks even where nothing is routed: when it is replayed, rows may be.
        """
        if not self.rows:
            is_compiled = torch.compiler.is_compiling() or rows > MAX_ROWS
            return None if is_compiled else self.of[:rows]
        each, rest = divmod(rows, self.rows)
        if rest or not each or UNKNOWN.search(path):
            raise InvalidError(f"{path} got {rows} rows, and {self.rows} are routed")
        index = self.of[: self.rows]
        return index if each == 1 else index.repeat_interleave(each)


class Fixed:
    """a (rank, in), b (rank, out), gates (mixes, rank) of one module."""

    def __init__(self, path: str, bank: Bank, sizes: tuple[int, int], board: Board) -> None:
        mixes, rank = sizes
        self.path, self.board = path, board
        self.a = bank.a.new_zeros(rank, bank.a.shape[1])
        self.b = bank.b.new_zeros(rank, bank.b.shape[1])
        self.gates = torch.zeros(mixes, rank, device=bank.a.device)

    def fill(self, mixes: Sequence[Sequence[Weighted]]) -> None:
        """Each mix's factors from the bank."""
        found = [banked(made) for made in mixes]
        places: dict[int, tuple[int, Banked]] = {}
        stop = 0
        for low in {low.start: low for made in found for _, low in made}.values():
            places[low.start] = stop, low
            stop += low.stop - low.start
        self._require_room(stop, len(mixes))
        for start, low in places.values():
            self.a[start : start + len(low.A)].copy_(low.A)
            self.b[start : start + len(low.A)].copy_(low.B.mT)
        gates = torch.zeros(self.gates.shape)
        for mix, made in enumerate(found):
            for weight, low in made:
                start = places[low.start][0]
                gates[mix, start : start + low.stop - low.start] += weight * low.scale
        self.gates.copy_(gates)

    def _require_room(self, rank: int, mixes: int) -> None:
        """Grows if it has to, which is announced: whatever was compiled is compiled again."""
        if rank <= len(self.a) and mixes <= len(self.gates):
            return
        text = (
            f"{self.path} has {rank} active ranks in {mixes} mixes, reserved were {len(self.a)} and"
            f" {len(self.gates)}: compiled code is compiled again; attach(..., max_rank={rank},"
            f" slots={mixes})"
        )
        warnings.warn(text, AdapterWarning, stacklevel=2)
        rows, count = max(rank, len(self.a)), max(mixes, len(self.gates))
        self.a = self.a.new_zeros(rows, self.a.shape[1])
        self.b = self.b.new_zeros(rows, self.b.shape[1])
        self.gates = self.gates.new_zeros(count, rows)

    def run(self, module: Any, original: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        y: Tensor = original(*args, **kwargs)
        z = project(module, x, self.a)
        index = self.board.index(x.shape[0], self.path)
        gate = self.gates[0]
        if index is not None:
            gate = self.gates[index].view(x.shape[0], *(1,) * (z.ndim - 2), -1)
        return (y + expand(module, (z * gate).to(self.b.dtype), self.b.mT)).to(y.dtype)


class Room:
    """That of all modules. slots: mixes of one batch; rank: of what is active on a module."""

    def __init__(self, slots: int | None, rank: int) -> None:
        self._mixes, self._rank = 1 + (slots or 1), rank
        self._boards: dict[torch.device, Board] = {}
        self._fixed: dict[str, Fixed] = {}

    def pack(self, state: Any, patches: Mapping[str, Patch], banks: Mapping[str, Bank]) -> None:
        """state: what is active, or routed, or None. Modules where that is more than factors are
        left to what their state does."""
        routed = isinstance(state, Routes)
        mixes = state.mixes if routed else [state]
        for board in self._boards.values():
            board.set(state.rows.of if routed else None)
        for path, bank in banks.items():
            patch = patches.get(path)
            if patch is None:
                continue
            if path not in self._fixed:
                self._fixed[path] = self._made(path, bank)
                self._fixed[path].board.set(state.rows.of if routed else None)
            is_odd = any(mix is not None and mix.is_odd(path) for mix in mixes)
            if not is_odd:
                self._fixed[path].fill([[] if m is None else m.updates(path) for m in mixes])
            patch.fixed = None if is_odd else self._fixed[path]

    def _made(self, path: str, bank: Bank) -> Fixed:
        device = bank.a.device
        if device not in self._boards:
            self._boards[device] = Board(torch.zeros(MAX_ROWS, dtype=torch.long, device=device))
        return Fixed(path, bank, (self._mixes, self._rank), self._boards[device])
