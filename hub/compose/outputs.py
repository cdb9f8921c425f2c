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


def taken(output: Any, seats: Tensor, names: Mapping[str, int]) -> Any:
    """The output at these positions (batch or 1, length); keys stay what the attention saw."""
    for name, axis in names.items():
        if output.get(name) is not None:
            output[name] = _each(output[name], seats, axis)
    return output


def without(output: Any, name: str) -> Any:
    """The output as if the forward had not made this part of it."""
    return type(output)(**{key: value for key, value in output.items() if key != name})


def as_wanted(output: Any, wanted: bool | None, config: Any) -> Any:
    """As a tuple, where the caller or the config says so."""
    as_dict = config.return_dict if wanted is None else wanted
    return output if as_dict else output.to_tuple()


def _each(value: Any, seats: Tensor, axis: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_each(item, seats, axis) for item in value)
    if not isinstance(value, Tensor):
        return value
    seats = seats.to(value.device)
    if len(seats) == 1:
        return value.index_select(axis, seats[0])
    rows = torch.arange(len(value), device=value.device)[:, None]
    return value.movedim(axis, 1)[rows, seats].movedim(1, axis)
