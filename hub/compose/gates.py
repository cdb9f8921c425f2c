"""Prefixes that count as much as the input of their attention says: AdapterHub's gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from adapterkit.hub.compose.caches import Held
from adapterkit.hub.compose.inputs import Call
from adapterkit.hub.compose.standing import Gate
from adapterkit.hub.compose.swap import Forward
from adapterkit.registry.errors import InvalidError


def run_gated(gates: Sequence[Gate], index: int, original: Forward, call: Call) -> Any:
    """An attention whose part of the cache is written anew, as its input says.  index: of its layer
    in the cache."""
    cache: Any = call["past_key_values"]
    layer: Any = getattr(cache, "self_attention_cache", cache).layers[index]
    if type(layer) is not DynamicLayer:
        raise InvalidError("a gated prefix cannot stand before an attention with a sliding window")
    write(layer, gates, call["hidden_states"])
    return original(**call)


def write(layer: Any, gates: Sequence[Gate], x: Tensor) -> None:
    """The gated parts of one layer of a cache, for the input x (batch, length, width)."""
    keys, values = layer.keys.clone(), layer.values.clone()
    for gate in gates:
        part = scaled(gate, x)
        keys[:, :, gate.start : gate.stop] = part.k.to(keys.dtype)
        values[:, :, gate.start : gate.stop] = part.v.to(values.dtype)
    layer.keys, layer.values = keys, values


def scaled(gate: Gate, x: Tensor) -> Held:
    """What this gate lets through for each row of x; k, v (batch, heads, n, size)."""
    score = torch.sigmoid(x.float() @ gate.weight.mT + gate.bias).mean(1)
    by_key, by_value = (score[:, i].reshape(-1, 1, 1, 1) for i in (0, -1))
    return Held(gate.part.k * by_key, gate.part.v * by_value)
