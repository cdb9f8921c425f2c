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
from adapterkit.hub.compose.here import Current, recompile
from adapterkit.hub.compose.inputs import Call
from adapterkit.hub.compose.standing import Attended, Standing
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
        gated = (path for path, one in found.own.items() if one.gates)
        for path in (*gated, *found.sides):
            self._swap(path, self._run_attention, "forward")
        for path in (*found.own, *found.sides):
            if has_bias(self._model.get_submodule(path)):
                self._swap(path, self._run_bias, BIAS)

    def remove(self) -> None:
        for swap in reversed(self._swaps.values()):
            swap.remove()
        self._swaps.clear()

    def _swap(self, path: str, run: Any, name: str) -> None:
        if (path, name) not in self._swaps:
            recompile()
            module = self._model.get_submodule(path)
            self._swaps[path, name] = Swap(module, partial(run, path), name=name)

    def _run_attention(self, path: str, original: Forward, call: Call) -> Any:
        found = self._current.now
        if found is None or path not in found.own.keys() | found.sides.keys():
            return original(**call)
        x: Tensor = call["hidden_states"]
        if path in found.sides:
            _begin_side(found, found.sides[path], call, x)
        elif found.own[path].gates:
            return run_gated(found.own[path], found.index(len(x), x.device), original, call)
        return original(**call)

    def _run_bias(self, path: str, original: Forward, call: Call) -> Any:
        """The library counts n keys that stand in front as positions, and no query behind them."""
        found = self._current.now
        if found is None:
            return original(**call)
        if path in found.sides:
            unseen = found.sides[path].counts
        elif path in found.own:
            unseen = tuple(mix.n_keys - mix.n_shifting for mix in found.mixes)
        else:
            return original(**call)
        seen = call.get(SEEN, 0)
        return found.chosen(unseen, lambda n: original(**{**call, SEEN: seen - n}))


def _begin_side(found: Standing, side: Attended, call: Call, x: Tensor) -> None:
    """Keys in front of an attention, that no position follows."""
    cache: Any = call.get(CACHE)
    if cache is None or not side.cross:
        own = (DynamicCache(), DynamicCache())
        cache = call[CACHE] = EncoderDecoderCache(*own) if side.cross else own[0]
    store = cache.cross_attention_cache if side.cross else cache
    if store.get_seq_length(side.layer) == 0:
        caches.fill(store, {side.layer: found.of_rows(side.held, len(x))}, len(x), x.dtype)
    if side.gates:
        write(store.layers[side.layer], side.gates, x, found.index(len(x), x.device))
    seen = found.spread(side.seen, len(x), x.device)[:, None, None]
    mask = call.get(MASK)
    if mask is None and len(set(side.counts)) > 1:
        mask = x.new_zeros(1, 1, 1, _attended(side, store, call, x))
    if isinstance(mask, Tensor):
        call[MASK] = _with(mask, seen)


def _attended(side: Attended, store: Any, call: Call, x: Tensor) -> int:
    """Keys that the attention has but for those in front."""
    held = store.get_seq_length(side.layer) - side.n
    return held or len((call["key_value_states"] if side.cross else x)[0])


def _with(mask: Tensor, seen: Tensor) -> Tensor:
    """The mask, which is added or which is true where one sees, behind columns for seen (rows or 1,
    1, 1, n)."""
    rows = max(len(mask), len(seen))
    if mask.dtype != torch.bool:
        hides = torch.finfo(mask.dtype).min
        seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill(~seen, hides)
    front = seen.expand(rows, *mask.shape[1:-1], -1)
    return torch.cat([front, mask.expand(rows, *mask.shape[1:])], dim=-1)
