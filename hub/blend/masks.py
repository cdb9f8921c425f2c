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
    """Numbers in [0, 1) for the entries of one tensor, in its order; any run of them by itself."""

    def uniform(self, start: int, count: int) -> Tensor: ...


# Random words one Philox block gives; streams start at block boundaries.
BLOCK = 4


class Masks:
    """Choices for the entries of one tensor of one input. seed: the user's; name: the module's;
    index: which of the inputs."""

    def __init__(self, seed: int, name: str, index: int) -> None:
        digest = hashlib.sha256(f"{seed}\0{name}\0{index}".encode()).digest()
        self._key = int.from_bytes(digest[:16], "little")

    def uniform(self, start: int, count: int) -> Tensor:
        """Numbers in [0, 1) for the entries start to start + count, flattened; float32 (count)."""
        first, skip = divmod(start, 2 * BLOCK)  # two entries a word
        words = np.random.Philox(key=self._key, counter=first).random_raw((skip + count + 1) // 2)
        halves = words.view("<u4" if words.dtype.byteorder != ">" else ">u4")[skip : skip + count]
        # the upper 24 bits: each value is exact in float32
        return torch.from_numpy((halves >> 8).astype(np.float32) * np.float32(2.0**-24))
