"""Prefixes that count as much as the input of their attention says: AdapterHub's gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from adapterkit.hub.compose.caches import Held
from adapterkit.hub.compose.inputs import Call
from adapterkit.hub.compose.standing import Attended, Gate
from adapterkit.hub.compose.swap import Forward
from adapterkit.registry.errors import InvalidError


def run_gated(one: Attended, index: Tensor, original: Forward, call: Call) -> Any:
    """An attention whose part of the cache is written anew, as its input says."""
    cache: Any = call["past_key_values"]
    layer: Any = getattr(cache, "self_attention_cache", cache).layers[one.layer]
    if type(layer) is not DynamicLayer:
        raise InvalidError("a gated prefix cannot stand before an attention with a sliding window")
    write(layer, one.gates, call["hidden_states"], index)
    return original(**call)


def write(layer: Any, gates: Sequence[Gate], x: Tensor, index: Tensor) -> None:
    """The gated parts of one layer of a cache, for the input x (batch, length, width).  index
    (batch or 1): the mix of each row."""
    keys, values = layer.keys.clone(), layer.values.clone()
    for gate in gates:
        part, mine = scaled(gate, x), (index == gate.mix).view(-1, 1, 1, 1)
        for held, made in ((keys, part.k), (values, part.v)):
            old = held[:, :, gate.start : gate.stop]
            held[:, :, gate.start : gate.stop] = torch.where(mine, made.to(held.dtype), old)
    layer.keys, layer.values = keys, values


def scaled(gate: Gate, x: Tensor) -> Held:
    """What this gate lets through for each row of x; k, v (batch, heads, n, size)."""
    score = torch.sigmoid(x.float() @ gate.weight.mT + gate.bias).mean(1)
    by_key, by_value = (score[:, i].reshape(-1, 1, 1, 1) for i in (0, -1))
    return Held(gate.part.k * by_key, gate.part.v * by_value)
