"""Attentions that take part in prefixes themselves: gated ones, those of an encoder beside a
decoder, those of a decoder to it, and those whose bias counts positions."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from adapterkit.hub.compose import caches
from adapterkit.hub.compose.gates import run_gated, write
from adapterkit.hub.compose.here import Current
from adapterkit.hub.compose.inputs import Call
from adapterkit.hub.compose.standing import Side, Standing
from adapterkit.hub.compose.swap import Forward, Swap

CACHE, MASK, SEEN = "past_key_values", "mask", "past_seen_tokens"
BIAS = "compute_bias"


def has_bias(module: nn.Module) -> bool:
    """Whether it makes the bias of relative positions, which the other layers share."""
    return hasattr(module, BIAS) and hasattr(module, "relative_attention_bias")


class Sides:
    """Their swapped forwards, each doing what is active for it."""

    def __init__(self, model: nn.Module, current: Current[Standing | None]) -> None:
        self._model, self._current = model, current
        self._swaps: dict[tuple[str, str], Swap] = {}

    def install(self, found: Standing) -> None:
        """Swaps what takes part in it, if it is not swapped yet."""
        for path in (*found.gates, *found.sides):
            self._swap(path, self._run_attention, "forward")
        for path in (*found.layers, *found.sides):
            if has_bias(self._model.get_submodule(path)):
                self._swap(path, self._run_bias, BIAS)

    def remove(self) -> None:
        for swap in reversed(self._swaps.values()):
            swap.remove()
        self._swaps.clear()

    def _swap(self, path: str, run: Any, name: str) -> None:
        if (path, name) not in self._swaps:
            module = self._model.get_submodule(path)
            self._swaps[path, name] = Swap(module, partial(run, path), name=name)

    def _run_attention(self, path: str, original: Forward, call: Call) -> Any:
        found = self._current.now
        if found is not None and path in found.gates:
            return run_gated(found.gates[path], found.layers[path], original, call)
        if found is not None and path in found.sides:
            return _run_side(found.sides[path], original, call)
        return original(**call)

    def _run_bias(self, path: str, original: Forward, call: Call) -> Any:
        """The library counts n keys that stand in front as positions, and no query behind them."""
        found = self._current.now
        n = 0
        if found is not None and path in found.layers:
            n = found.n_keys - found.n_shifting
        elif found is not None and path in found.sides:
            n = found.sides[path].n
        if n:
            call[SEEN] = call.get(SEEN, 0) - n
        return original(**call)


def _run_side(side: Side, original: Forward, call: Call) -> Any:
    """An attention with keys in front that no position follows."""
    x: Tensor = call["hidden_states"]
    cache: Any = call.get(CACHE)
    if cache is None or not side.cross:
        own = (DynamicCache(), DynamicCache())
        cache = call[CACHE] = EncoderDecoderCache(*own) if side.cross else own[0]
    store = cache.cross_attention_cache if side.cross else cache
    if store.get_seq_length(side.layer) == 0:
        caches.fill(store, {side.layer: side.held}, len(x), x.dtype)
    if side.gates:
        write(store.layers[side.layer], side.gates, x)
    mask = call.get(MASK)
    if isinstance(mask, Tensor):
        call[MASK] = torch.cat([_visible(mask, side.n), mask], dim=-1)
    return original(**call)


def _visible(mask: Tensor, n: int) -> Tensor:
    """n columns that hide nothing, of a mask that is added or that is true where one sees."""
    shape = (*mask.shape[:-1], n)
    return mask.new_ones(shape) if mask.dtype == torch.bool else mask.new_zeros(shape)
