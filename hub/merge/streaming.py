"""A dense tensor changed by chunks of rows, in threads, and handed on in order.

A chunk is read and written at once; it is changed by blocks that stay in the cache of a core, in
memory that the next block uses again.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapterkit.hub.headers import Stored
from adapterkit.hub.merge.fidelity import Sums, added, sums
from adapterkit.hub.merge.update import Update
from adapterkit.hub.tensors import DTYPES, read_tensor

# Values of a chunk, and of a block.
CHUNK, BLOCK = 1 << 19, 1 << 18
# Bytes that are copied at once.
COPIED = 1 << 22
# More would wait for the thread that hashes what comes out.
THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of a tensor from `start`, and what happens to them; rows: None for all."""

    start: int
    rows: int | None
    update: Update


@dataclass(frozen=True, eq=False)
class Made:
    """values (n, columns): as the file gets them. found: None where nothing was to change."""

    values: Tensor
    found: Sums | None = None


def raw(stored: Stored) -> Iterator[memoryview]:
    for start in range(stored.start, stored.stop, COPIED):
        yield memoryview(stored.source.read(start, min(COPIED, stored.stop - start)))


def changed(stored: Stored, pieces: Iterable[Piece], dtype: torch.dtype) -> Iterator[Made]:
    """The tensor after its changes, rounded once to dtype, from its first row to its last."""
    if not math.prod(stored.shape):
        return
    calls = [
        lambda piece=piece, start=start, n=n: _chunk(stored, piece, slice(start, start + n), dtype)
        for piece in pieces
        for start, n in _spans(stored, piece)
    ]
    if len(calls) == 1:
        yield calls[0]()
        return
    with ThreadPoolExecutor(THREADS) as pool, closing(_ordered(pool, calls)) as found:
        yield from found


def _ordered(
    pool: ThreadPoolExecutor, calls: Iterable[Callable[[], Made]]
) -> Generator[Made, None, None]:
    waiting: deque[Future[Made]] = deque()
    try:
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) > 2 * THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _columns(stored: Stored, piece: Piece) -> int:
    """Of fused experts, each is a matrix. A tensor of one dimension has one column."""
    return math.prod(stored.shape[1:]) if piece.rows is None else stored.shape[-1]


def _spans(stored: Stored, piece: Piece) -> Iterator[tuple[int, int]]:
    """(first row within the piece, number of rows) of each chunk."""
    count = piece.rows
    if count is None:
        count = stored.shape[0] if stored.shape else 1
    step = count if piece.update.is_whole else max(1, CHUNK // _columns(stored, piece))
    for start in range(0, count, step):
        yield start, min(step, count - start)


def _chunk(stored: Stored, piece: Piece, rows: slice, dtype: torch.dtype) -> Made:
    held = _read(stored, piece, rows)
    if piece.update.is_empty:
        return Made(held.to(dtype))
    n, columns = held.shape
    step = n if piece.update.is_whole else max(1, BLOCK // columns)
    made = torch.empty(n, columns, dtype=dtype)
    working = torch.float64 if held.dtype == torch.float64 else torch.float32
    room = torch.empty(3, min(step, n), columns, dtype=working)
    found: Sums = {}
    for start in range(0, n, step):
        part = slice(start, start + step)
        block = _block(held[part], piece.update, rows.start + start, made[part], room)
        found = added(found, block)
    return Made(made, found)


def _block(held: Tensor, update: Update, start: int, made: Tensor, room: Tensor) -> Sums:
    """Fills `made`."""
    w, target, stored = (each[: len(held)] for each in room)
    w.copy_(held)
    target = update.applied(w, start, out=target)
    made.copy_(target)
    stored.copy_(made)
    own = w.to(made.dtype).to(w.dtype) if held.dtype != made.dtype else None
    return sums(w, target, stored, own, spent=True)


def _read(stored: Stored, piece: Piece, rows: slice) -> Tensor:
    dtype, columns = DTYPES[stored.dtype], _columns(stored, piece)
    width = columns * dtype.itemsize
    start = stored.start + (piece.start + rows.start) * width
    n = rows.stop - rows.start
    shape = (n, columns)
    return read_tensor(replace(stored, shape=shape, start=start, stop=start + n * width))
