"""What a forward returns, without the positions of virtual tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# outputs (batch, length, ...), and those that hold one such for each layer
TOKENS = ("last_hidden_state", "hidden_states")
# (batch, heads, length, keys) for each layer
ROWS = ("attentions",)


def cut(output: Any, start: int, n: int) -> Any:
    """The output without positions start to start + n; keys stay what the attention saw."""
    for name in TOKENS:
        if output.get(name) is not None:
            output[name] = _each(output[name], start, n, 1)
    for name in ROWS:
        if output.get(name) is not None:
            output[name] = _each(output[name], start, n, -2)
    return output


def without(output: Any, name: str) -> Any:
    """The output as if the forward had not made this part of it."""
    return type(output)(**{key: value for key, value in output.items() if key != name})


def _each(value: Any, start: int, n: int, axis: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_each(item, start, n, axis) for item in value)
    if not isinstance(value, Tensor):
        return value
    length = value.shape[axis]
    first = value.narrow(axis, 0, start)
    rest = value.narrow(axis, start + n, length - start - n)
    return rest if start == 0 else torch.cat([first, rest], dim=axis)
