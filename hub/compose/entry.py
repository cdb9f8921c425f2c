"""The batch as a setup needs it: repeated for Parallel, of the given size for BatchSplit.

Rows of a batch do not see each other, so repeating them where the model is entered gives what
repeating them at the first place that needs it does (there the library repeats them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adapterkit.hub.bases.base import Base
from adapterkit.hub.compose.admit import Options
from adapterkit.hub.compose.blocks import BatchSplit, Block, Setup, channels
from adapterkit.hub.compose.here import Current, recompile
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.compose.rows import Rows
from adapterkit.registry.errors import InvalidError

# Arguments with a row for each of the batch, and one that has none.
INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids")
WHOLE = ("cache_position",)


@dataclass(frozen=True)
class State:
    """copies: of the batch; sizes: of the batch, as each outermost BatchSplit wants it."""

    copies: int = 1
    sizes: tuple[tuple[int, ...], ...] = ()

    @property
    def is_plain(self) -> bool:
        return self.copies == 1 and not self.sizes


PLAIN = State()


class Entry:
    def __init__(self, model: nn.Module, base: Base, options: Options) -> None:
        self._model = model
        self._handle: RemovableHandle | None = None
        self.current: Current[State] = Current(PLAIN)

    def plan(self, active: Setup, lowered: Mapping[str, Lowered]) -> State:
        block = active.block if active.is_composed else None
        if block is None:
            return PLAIN
        state = State(channels(block), _outermost(block))
        if not state.is_plain and self._handle is None:
            self._handle = self._model.register_forward_pre_hook(self._enter, with_kwargs=True)
            recompile()
        return state

    def route(self, states: Sequence[State], rows: Rows) -> State:
        return PLAIN

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        state = self.current.now
        rows = _rows(args, kwargs)
        for sizes in state.sizes:
            if sum(sizes) != rows:
                raise InvalidError(f"batch_sizes {list(sizes)} are {sum(sizes)} rows, found {rows}")
        if state.copies == 1:
            return args, kwargs
        if kwargs.get("past_key_values") is not None:
            raise InvalidError(
                "Parallel repeats the batch, which a cache of earlier tokens cannot follow",
                hint="repeat the batch yourself and use BatchSplit",
            )
        copied = {
            name: value if name in WHOLE else _repeated(value, rows, state.copies)
            for name, value in kwargs.items()
        }
        return tuple(_repeated(value, rows, state.copies) for value in args), copied


def _repeated(value: Any, rows: int, copies: int) -> Any:
    if not isinstance(value, Tensor) or not value.ndim or len(value) != rows:
        return value
    return value.repeat(copies, *[1] * (value.ndim - 1))


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Of the batch."""
    named = [kwargs[name] for name in INPUTS if isinstance(kwargs.get(name), Tensor)]
    tensors = [value for value in (*named, *args, *kwargs.values()) if isinstance(value, Tensor)]
    return len(tensors[0]) if tensors and tensors[0].ndim else 0


def _outermost(block: Block) -> tuple[tuple[int, ...], ...]:
    """batch_sizes of what sees the whole batch."""
    if isinstance(block, BatchSplit):
        return (block.batch_sizes,)
    inner = (child for child in block.children if isinstance(child, Block))
    return tuple(sizes for child in inner for sizes in _outermost(child))
