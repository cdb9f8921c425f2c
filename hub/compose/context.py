"""Prefixes and virtual tokens: what stands in front of the input of a live model.

They are written once, where a sequence starts: into the empty cache, and before the embedded
tokens. From then on the cache has them, and every step only sees a longer mask and later positions.
Of rows that are routed, those with less in front are padded: in front, where what follows counts
from the end, and behind the last token in an encoder, which counts from the start.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from adapterkit.hub.bases.base import Base
from adapterkit.hub.compose import inputs, outputs
from adapterkit.hub.compose.admit import Options
from adapterkit.hub.compose.fronts import by_rows, standing
from adapterkit.hub.compose.here import Current, recompile
from adapterkit.hub.compose.inputs import Call
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.compose.onestack import OneStack
from adapterkit.hub.compose.possible import (
    body_of,
    encodes,
    labels_whole,
    require_possible,
    require_routable,
)
from adapterkit.hub.compose.rows import Rows
from adapterkit.hub.compose.running import Running
from adapterkit.hub.compose.sides import Sides
from adapterkit.hub.compose.standing import Standing
from adapterkit.hub.compose.swap import Forward, Swap
from adapterkit.hub.compose.twostacks import TwoStacks
from adapterkit.registry.errors import MismatchError

FLAGS = "block_flag"
# End of the classes whose labels are not those of the next token.
SAME = "ForTokenClassification"


class Context:
    """Swapped forwards of the model, of its body, and of what embeds or encodes its input."""

    def __init__(self, model: nn.Module, base: Base, options: Options) -> None:
        self._model: Any = model
        self._base = base
        self._keep = options.virtual_outputs
        self._swaps: list[Swap] = []
        self.current: Current[Standing | None] = Current(None)
        self._sides = Sides(model, self.current)
        self._here = Running()

    def plan(self, active: Mapping[str, float], lowered: Mapping[str, Lowered]) -> Standing | None:
        found = standing(self._model, self._base, active, lowered)
        if found is not None:
            require_possible(self._model, found)
            if not self._swaps:
                self._install()
            self._sides.install(found)
        return found

    def route(self, states: Sequence[Standing | None], rows: Rows) -> Standing | None:
        found = by_rows(states, rows)
        if found is not None:
            require_routable(self._model, found)
        return found

    def remove(self) -> None:
        self._sides.remove()
        for swap in reversed(self._swaps):
            swap.remove()
        self._swaps.clear()

    def _install(self) -> None:
        recompile()
        stack: OneStack | TwoStacks
        if self._is_pair:
            stack = TwoStacks(self._model, self._active, self._here)
        else:
            stack = OneStack(self._model, self._active, self._here, keep=self._keep)
        self._swaps += [*stack.install(), Swap(self._model, self._run_model, (FLAGS,))]

    def _active(self) -> Standing | None:
        self._here.entered = True
        return self.current.now

    @property
    def _is_pair(self) -> bool:
        return bool(self._model.config.is_encoder_decoder)

    def _run_model(self, original: Forward, call: Call) -> Any:
        """The whole model: what only it knows of the call."""
        self._here.flags, self._here.entered = call.pop(FLAGS, None), False
        found = self.current.now
        # a loss counts the first real token, which only the last virtual position foretells
        inserts = found is not None and not labels_whole(self._model) and not self._is_pair
        if found is not None and inserts and found.n_rows:
            if self._keep:
                inputs.shift_spans(call, found.n_rows)
            self._here.labels = self._extend_labels(call, found)
        try:
            if found is not None and self._here.labels:
                output = self._labelled(original, call, found)
            else:
                output = original(**call)
        finally:
            self._here.flags, self._here.labels = None, False
        if found is not None and not self._here.entered:
            name = type(self._model).__name__
            raise MismatchError(f"{name} does not call what prefixes and prompts are put before")
        return output

    def _extend_labels(self, call: Call, found: Standing) -> bool:
        """Whether tokens have labels; then virtual ones have some that count nowhere."""
        labels = call.get("labels")
        if not isinstance(labels, Tensor) or labels.ndim != 2:
            return False
        (batch, length), name = labels.shape, type(self._model).__name__
        same = encodes(self._model, body_of(self._model)) or name.endswith(SAME)
        if found.is_padded and not same:
            alone = found.spread(found.numbers(lambda mix: mix.n_rows), batch, labels.device) == 0
            labels = labels.clone()
            labels[alone, 0] = inputs.IGNORED  # padding foretells nothing
        seats = found.spread(found.seats(length, padded=True), batch, labels.device)
        call["labels"] = inputs.extended(labels, seats, found.n_rows)
        return True

    def _labelled(self, original: Forward, call: Call, found: Standing) -> Any:
        """The model with a loss over all positions, and outputs without virtual ones."""
        wanted, (batch, length) = call.pop("return_dict", None), inputs.shape(call)
        output = original(**call, return_dict=True)
        if not self._keep:
            seats = found.spread(found.seats(length, padded=True), batch)
            output = outputs.taken(output, seats, outputs.HEAD)
        return outputs.as_wanted(output, wanted, self._model.config)
