"""Random choices that are the same on every machine: counter-based, keyed by seed, name and place.

Word n of a stream is the n-th output of SplitMix64 (Steele, Lea and Flood 2014) from the state that
is its key. Two keys are the first 16 bytes, little-endian, of the sha256 of "seed NUL name NUL
index". Entry i has 32 bits: the upper 16 are bits 16 (i mod 4) and up of word i div 4 under the
first key, the lower 16 the upper ones of word i under the second, seldom needed.
"""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

Words = np.ndarray[tuple[int], np.dtype[np.uint64]]

STEP = np.uint64(0x9E3779B97F4A7C15)
ROUNDS = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
LAST_SHIFT = np.uint64(31)


class Draws(Protocol):
    """Choices for the entries of one tensor, in its order; any run of them by itself, in memory
    that is the caller's."""

    def uniform(self, start: int, count: int) -> Tensor:
        """Numbers in [0, 1) for the entries start to start + count, flattened; float32 (count)."""

    def chosen(self, start: int, count: int, probability: float) -> Tensor:
        """1 where the number is below the probability, else 0; float32 (count), as torch takes
        several times longer over booleans."""


class Masks:
    """Choices for the entries of one tensor of one input. seed: the user's; name: the module's;
    index: which of the inputs."""

    def __init__(self, seed: int, name: str, index: int) -> None:
        digest = hashlib.sha256(f"{seed}\0{name}\0{index}".encode()).digest()
        self._upper_key, self._lower_key = np.frombuffer(digest, "<u8", 2).astype(np.uint64)

    def uniform(self, start: int, count: int) -> Tensor:
        lower = self._lower(np.arange(start, start + count, dtype=np.uint64))
        bits = self._upper(start, count).astype(np.uint32) << np.uint32(16) | lower
        # 24 of them: each value is exact in float32
        return torch.from_numpy((bits >> np.uint32(8)).view(np.int32)).float().mul_(2.0**-24)

    def chosen(self, start: int, count: int, probability: float) -> Tensor:
        highest, lowest = divmod(math.ceil(probability * 2**32) - 1, 2**16)
        upper = self._upper(start, count)
        found = upper < np.uint16(highest)
        (undecided,) = np.nonzero(upper == np.uint16(highest))
        found[undecided] = self._lower((undecided + start).astype(np.uint64)) <= lowest
        return torch.from_numpy(found.view(np.uint8)).float()

    def _upper(self, start: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
        first, skip = divmod(start, 4)
        places = np.arange(first, first - (-(skip + count) // 4), dtype=np.uint64)
        words = splitmix(self._upper_key, places).astype("<u8", copy=False)
        return words.view("<u2")[skip : skip + count].astype(np.uint16, copy=False)

    def _lower(self, entries: Words) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        return (splitmix(self._lower_key, entries) >> np.uint64(48)).astype(np.uint32)


def splitmix(key: np.uint64, places: Words) -> Words:
    """The words at these places, in the memory of the places."""
    words = places
    words += np.uint64(1)
    words *= STEP
    words += key
    for shift, factor in ROUNDS:
        words ^= words >> shift
        words *= factor
    words ^= words >> LAST_SHIFT
    return words
