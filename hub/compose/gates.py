"""Prefixes that count as much as the input of their attention says: AdapterHub's gates."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from adapterkit.hub.compose.inputs import Call
from adapterkit.hub.compose.standing import Gate
from adapterkit.hub.compose.swap import Forward, Swap
from adapterkit.registry.errors import InvalidError


class Gates:
    """Swapped forwards of the attentions that have any: each writes its part of the cache anew."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._swaps: list[Swap] = []

    def switch(self, gates: Mapping[str, tuple[Gate, ...]]) -> None:
        for swap in reversed(self._swaps):
            swap.remove()
        self._swaps = [
            Swap(self._model.get_submodule(path), partial(_run, path, self._model, found))
            for path, found in gates.items()
        ]


def _run(
    path: str, model: nn.Module, gates: tuple[Gate, ...], original: Forward, call: Call
) -> Any:
    cache = call.get("past_key_values")
    cache = getattr(cache, "self_attention_cache", cache)
    layer: Any = cache.layers[getattr(model.get_submodule(path), "layer_idx")]  # noqa: B009
    if type(layer) is not DynamicLayer:
        raise InvalidError(f"{path} has a sliding window, which a gated prefix cannot stand before")
    for gate in gates:
        layer.keys, layer.values = _written(gate, call["hidden_states"], layer.keys, layer.values)
    return original(**call)


def _written(gate: Gate, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The cache of a layer with the part of this gate scaled for input x (batch, length, width)."""
    score = torch.sigmoid(x.float() @ gate.weight.mT + gate.bias).mean(1)
    by_key, by_value = (score[:, i].reshape(-1, 1, 1, 1) for i in (0, -1))
    new = (gate.part.k * by_key, gate.part.v * by_value)
    held = []
    for whole, part in zip((keys, values), new, strict=True):
        changed = whole.clone()
        changed[:, :, gate.start : gate.stop] = part.to(whole.dtype)
        held.append(changed)
    return held[0], held[1]
