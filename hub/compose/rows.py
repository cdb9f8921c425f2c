"""Which row of the batch each row of a module's input belongs to.

A hook on the model, and on each stack inside it, notes the batch that runs. A module's input has a
row for each of the batch, (B, ...), or one for each token, (B * T, h); under beam search the batch
of the model is the caller's rows, each repeated for its beams.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapterkit.hub.compose.here import Here, lasting, recompile
from adapterkit.registry.errors import InvalidError

# Arguments that have a row for each of the batch, then a length.
INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")
# What gets a number of tokens, or of positions, that says nothing of their rows.
UNKNOWN = re.compile(r"(^|\.)experts\.\w*\d+(\.|$)|\brelative_attention_bias$")


class Layout(NamedTuple):
    """Of a module's input. rows: of the batch; tokens: rows of the input for each of them; only:
    the mix of all of them, if it is one."""

    rows: int
    tokens: int
    only: int | None = None


class Batch(Here):
    """The batch that runs in this thread. rows: 0 where none is known; length: tokens of each;
    extra: virtual tokens in front of them; held: positions that a cache has beside tokens; ends: of
    each row, how many of the extra ones are padding at its end, None where none is; outer: the
    batches of the calls around this one; only: the mix of the rows that a part of a layer was
    called with, while it was."""

    def __init__(self) -> None:
        self.rows = 0
        self.length = 0
        self.extra = 0
        self.held = 0
        self.ends: Tensor | None = None
        self.outer: list[tuple[int, int]] = []
        self.only: int | None = None

    @contextmanager
    def part(self, mix: int) -> Iterator[None]:
        """Modules are called with the rows that have this mix."""
        self.only = mix
        try:
            yield
        finally:
            self.only = None


@dataclass(frozen=True, eq=False)
class Rows:
    """of: for each row that the caller routes, the number of its mix. padded: mixes whose rows have
    padding in place of what stands in front of others."""

    of: tuple[int, ...]
    batch: Batch
    padded: set[int] = field(default_factory=set)
    _spread: dict[Layout, tuple[int, ...]] = field(default_factory=dict)
    _index: dict[tuple[Layout, torch.device], Tensor] = field(default_factory=dict)
    _members: dict[tuple[Layout, torch.device], dict[int, Tensor]] = field(default_factory=dict)

    def check(self, rows: int) -> None:
        """Raises InvalidError for a batch that these rows are not."""
        if not rows or rows % len(self.of):
            raise InvalidError(f"{len(self.of)} rows are routed, but the batch has {rows}")

    def within(self, shape: torch.Size, name: str) -> Layout:
        """How a module's input is laid out.

        Raises InvalidError naming the module if its rows are not those of the batch."""
        batch = self.batch
        if batch.only is not None:
            return Layout(shape[0], 1, batch.only)
        if UNKNOWN.search(name):
            raise InvalidError(
                f"{name} gets tokens of any rows of the batch, so it cannot be routed"
            )
        if not batch.rows:
            raise InvalidError(f"{name} was called outside of the model, so its rows are not known")
        self.check(batch.rows)
        if shape[0] == batch.rows:
            return Layout(batch.rows, 1)
        tokens, rest = divmod(shape[0], batch.rows)
        if rest or tokens not in (batch.length, batch.length + batch.extra):
            raise InvalidError(
                f"{name} got {shape[0]} rows of a batch of {batch.rows} by {batch.length}: which"
                " rows of the batch they are is not known, so it cannot be routed"
            )
        return Layout(batch.rows, tokens)

    def spread(self, layout: Layout) -> tuple[int, ...]:
        """The mix of each row of an input that is laid out so."""
        if layout not in self._spread:
            of = self.of if layout.only is None else (layout.only,)
            each = layout.rows // len(of) * layout.tokens
            self._spread[layout] = tuple(mix for mix in of for _ in range(each))
        return self._spread[layout]

    def index(self, layout: Layout, device: torch.device) -> Tensor:
        """The same, (rows), on a device."""
        key = layout, device
        if key not in self._index:
            with lasting():
                self._index[key] = torch.tensor(self.spread(layout), device=device)
        return self._index[key]

    def members(self, layout: Layout, device: torch.device) -> Iterable[tuple[int, Tensor]]:
        """(mix, the rows that have it) of each mix in use."""
        key = layout, device
        if key not in self._members:
            found: dict[int, list[int]] = {}
            for row, mix in enumerate(self.spread(layout)):
                found.setdefault(mix, []).append(row)
            with lasting():  # and made of numbers: to look for rows on a GPU is to wait for it
                self._members[key] = {
                    mix: torch.tensor(found[mix], device=device) for mix in sorted(found)
                }
        return self._members[key].items()


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
        names = *INPUTS, str(getattr(stack, "main_input_name", ""))
        given = [kwargs[name] for name in names if isinstance(kwargs.get(name), Tensor)]
        tensors = [value for value in (*args, *given) if isinstance(value, Tensor)]
        if tensors and tensors[0].ndim > 1:
            self.batch.rows, self.batch.length = tensors[0].shape[0], tensors[0].shape[1]

    def _leave(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.batch.rows, self.batch.length = self.batch.outer.pop()
