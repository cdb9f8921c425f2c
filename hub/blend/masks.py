"""Random choices that are the same on every machine: counter-based, keyed by seed, name and place.

Philox 4x64 with 10 rounds, Salmon et al. 2011 (Random123), as numpy implements it; numpy promises
that the raw stream of a bit generator never changes.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Draws(Protocol):
    """Numbers in [0, 1) for the entries of one tensor, in its order; any run of them by itself, in
    memory that is the caller's."""

    def uniform(self, start: int, count: int) -> Tensor: ...


# Random words one Philox block gives, and entries one word gives.
BLOCK = 4
PER_WORD = 4


class Masks:
    """Choices for the entries of one tensor of one input. seed: the user's; name: the module's;
    index: which of the inputs."""

    def __init__(self, seed: int, name: str, index: int) -> None:
        digest = hashlib.sha256(f"{seed}\0{name}\0{index}".encode()).digest()
        self._key = int.from_bytes(digest[:16], "little")
        # The last 8 of 24 bits are drawn once for all entries: the mean over seeds is as exact.
        self._low = digest[16] / 256

    def uniform(self, start: int, count: int) -> Tensor:
        """Numbers in [0, 1) for the entries start to start + count, flattened; float32 (count)."""
        first, skip = divmod(start, PER_WORD * BLOCK)
        n_words = -(-(skip + count) // PER_WORD)
        words = np.random.Philox(key=self._key, counter=first).random_raw(n_words)
        high = words.astype("<u8", copy=False).view("<u2")[skip : skip + count]
        # 24 bits: each value is exact in float32
        return torch.from_numpy(high.astype(np.float32)).add_(self._low).mul_(2.0**-16)
