"""What a forward returns, without the positions of virtual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Where positions are counted: hidden states are (batch, length, width), attentions (batch, heads,
# length, keys), one for each layer.
LAYERS = {"hidden_states": 1, "attentions": -2}
HEAD = {"logits": 1, **LAYERS}
ALL = {"last_hidden_state": 1, **LAYERS}


def cut(output: Any, start: int, n: int, names: Mapping[str, int]) -> Any:
    """The output without positions start to start + n; keys stay what the attention saw."""
    for name, axis in names.items():
        if output.get(name) is not None:
            output[name] = _each(output[name], start, n, axis)
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
