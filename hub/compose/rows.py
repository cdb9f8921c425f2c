"""Which row of the batch each row of a module's input belongs to.

A hook on the model, and on each stack inside it, notes the batch that runs. A module's input has a
row for each of the batch, (B, ...), or one for each token, (B * T, h); under beam search the batch
of the model is the caller's rows, each repeated for its beams.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapterkit.hub.compose.here import Here, recompile
from adapterkit.registry.errors import InvalidError

# Arguments that have a row for each of the batch, then a length.
INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
# (rows of the batch, rows of a module's input for each of them)
Layout = tuple[int, int]


class Batch(Here):
    """The batch that runs in this thread. rows: 0 where none is known; length: tokens of each;
    extra: virtual tokens in front of them; outer: the batches of the calls around this one."""

    def __init__(self) -> None:
        self.rows = 0
        self.length = 0
        self.extra = 0
        self.outer: list[tuple[int, int]] = []


@dataclass(frozen=True, eq=False)
class Rows:
    """of: for each row that the caller routes, the number of its mix."""

    of: tuple[int, ...]
    batch: Batch
    _spread: dict[Layout, tuple[int, ...]] = field(default_factory=dict)
    _index: dict[tuple[Layout, torch.device], Tensor] = field(default_factory=dict)

    def check(self, rows: int) -> None:
        """Raises InvalidError for a batch that these rows are not."""
        if not rows or rows % len(self.of):
            raise InvalidError(f"{len(self.of)} rows are routed, but the batch has {rows}")

    def within(self, shape: torch.Size, name: str) -> Layout:
        """How a module's input is laid out.

        Raises InvalidError naming the module if its rows are not those of the batch."""
        batch = self.batch
        if not batch.rows:
            raise InvalidError(f"{name} was called outside of the model, so its rows are not known")
        self.check(batch.rows)
        if shape[0] == batch.rows:
            return batch.rows, 1
        tokens, rest = divmod(shape[0], batch.rows)
        if rest or tokens not in (batch.length, batch.length + batch.extra):
            raise InvalidError(
                f"{name} got {shape[0]} rows of a batch of {batch.rows} by {batch.length}: which"
                " rows of the batch they are is not known, so it cannot be routed"
            )
        return batch.rows, tokens

    def spread(self, layout: Layout) -> tuple[int, ...]:
        """The mix of each row of an input that is laid out so."""
        if layout not in self._spread:
            rows, tokens = layout
            each = rows // len(self.of) * tokens
            self._spread[layout] = tuple(mix for mix in self.of for _ in range(each))
        return self._spread[layout]

    def index(self, layout: Layout, device: torch.device) -> Tensor:
        """The same, (rows), on a device."""
        key = layout, device
        if key not in self._index:
            self._index[key] = torch.tensor(self.spread(layout), device=device)
        return self._index[key]

    def members(self, layout: Layout, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """(mix, the rows that have it) of each mix in use."""
        index = self.index(layout, device)
        for mix in sorted(set(self.of)):
            yield mix, (index == mix).nonzero().flatten()


class Recorder:
    """The hooks that note the batch; put on the model once something is routed."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.batch = Batch()
        self._handles: list[RemovableHandle] = []

    def install(self) -> None:
        if self._handles:
            return
        recompile()
        for stack in self._stacks():
            self._handles += [
                stack.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
                stack.register_forward_hook(self._leave, always_call=True),
            ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _stacks(self) -> list[nn.Module]:
        """The model, its body, and the two stacks of a pair."""
        body = getattr(self._model, "base_model", self._model)
        found = [self._model, body]
        if getattr(self._model.config, "is_encoder_decoder", False):
            found += [self._model.get_encoder(), self._model.get_decoder()]
        return list({id(stack): stack for stack in found}.values())

    def _enter(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.batch.outer.append((self.batch.rows, self.batch.length))
        given = [kwargs[name] for name in INPUTS if isinstance(kwargs.get(name), Tensor)]
        tensors = [value for value in (*args, *given) if isinstance(value, Tensor)]
        if tensors and tensors[0].ndim > 1:
            self.batch.rows, self.batch.length = tensors[0].shape[0], tensors[0].shape[1]

    def _leave(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.batch.rows, self.batch.length = self.batch.outer.pop()
