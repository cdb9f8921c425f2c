"""Caches of keys and values that prefixes are written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from adapterkit.registry.errors import InvalidError

# What is active is written on the cache it filled, so that no other activation reads it.
MARK = "adapterkit_context"
KINDS = "DynamicCache, or EncoderDecoderCache of two"


@dataclass(frozen=True)
class Held:
    """Keys and values of one attention from all active prefixes.  k, v (rows, heads, n, size), one
    row for all or for each mix of a batch."""

    k: Tensor
    v: Tensor


def length(cache: Cache | None) -> int:
    """Positions in it; raises InvalidError for a kind that prefixes cannot be written to."""
    if cache is None:
        return 0
    parts = (
        (cache.self_attention_cache, cache.cross_attention_cache)
        if isinstance(cache, EncoderDecoderCache)
        else (cache,)
    )
    for part in parts:
        odd = [layer for layer in getattr(part, "layers", ()) if not _grows(layer)]
        if not isinstance(part, DynamicCache) or odd:
            name = type(odd[0] if odd else part).__name__
            raise InvalidError(
                f"prefixes and virtual tokens need a cache that grows ({KINDS}), found {name}",
                hint='leave cache_implementation out, or give "dynamic"',
            )
    return int(parts[0].get_seq_length())


def _grows(layer: object) -> bool:
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def own(cache: Cache | None) -> Any:
    """What is written on it."""
    return None if cache is None else vars(cache).get(MARK)


def mark(cache: Cache | None, activation: int) -> None:
    if cache is not None:
        vars(cache)[MARK] = activation


def require_own(cache: Cache | None, activation: int | None) -> None:
    """Raises InvalidError if the positions in a cache come from another activation."""
    if own(cache) != activation:
        raise InvalidError(
            "the cache holds positions from before the active prefixes and virtual tokens changed,"
            " expected an empty one"
        )


def fill(cache: Any, held: Mapping[int, Held], batch: int, dtype: torch.dtype) -> None:
    """Writes them in front of whatever each layer will hold. held: layer -> keys and values, of one
    row or of all."""
    for layer in sorted(held):
        both = (held[layer].k, held[layer].v)
        k, v = (t.to(dtype).expand(batch, *t.shape[1:]) for t in both)
        cache.update(k, v, layer)


def joined(parts: Sequence[Held]) -> Held:
    """One after the other."""
    k, v = torch.cat([p.k for p in parts], dim=2), torch.cat([p.v for p in parts], dim=2)
    return Held(k, v)
