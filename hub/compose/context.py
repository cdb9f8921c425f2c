"""Prefixes and virtual tokens: what stands in front of the input of a live model.

They are written once, where a sequence starts: into the empty cache, and before the embedded
tokens. From then on the cache has them, and every step only sees a longer mask and later positions.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from adapterkit.hub.bases.base import Base
from adapterkit.hub.compose import caches, inputs, outputs
from adapterkit.hub.compose.admit import Options
from adapterkit.hub.compose.here import Current, Here
from adapterkit.hub.compose.inputs import Call
from adapterkit.hub.compose.lowering import Lowered
from adapterkit.hub.compose.possible import require_kept, require_possible
from adapterkit.hub.compose.rows import Rows as Batch
from adapterkit.hub.compose.sides import Sides
from adapterkit.hub.compose.standing import Standing, standing
from adapterkit.hub.compose.swap import Forward, Swap
from adapterkit.hub.compose.twostacks import TwoStacks
from adapterkit.registry.errors import InvalidError, MismatchError

CACHE, FLAGS, MASK, POSITIONS = "past_key_values", "block_flag", "attention_mask", "position_ids"
EMBEDS, LENGTH = "inputs_embeds", "past_key_values_length"
# (start, number) of rows that are no tokens
Rows = list[tuple[int, int]]
# Ends of the classes that label a sequence as a whole.
WHOLE = ("ForSequenceClassification", "ForMultipleChoice")


class Running(Here):
    """The forward that runs. starts: whether it is the first of its sequence; entered: whether the
    body took part in it; labels: whether it has labels, which virtual positions share."""

    flags: object = None
    starts: bool = False
    entered: bool = False
    labels: bool = False


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

    def plan(
        self, active: Mapping[str, float], lowered: Mapping[str, Lowered]
    ) -> Standing | None:
        found = standing(self._model, self._base, active, lowered)
        if found is not None:
            require_possible(self._model, self._body, found)
            if not self._swaps:
                self._install()
            self._sides.install(found)
        return found

    def route(self, states: Sequence[Standing | None], rows: Batch) -> Standing | None:
        if any(state is not None for state in states):
            raise InvalidError("prefixes and virtual tokens are not routed by rows")
        return None

    def remove(self) -> None:
        self._sides.remove()
        for swap in reversed(self._swaps):
            swap.remove()
        self._swaps.clear()

    @property
    def _body(self) -> Any:
        """What the model puts its head on: in some families the only stack of a pair."""
        body = self._model.base_model
        return body if self._is_pair else getattr(body, "decoder", body)

    @property
    def _names(self) -> set[str]:
        return set(inspect.signature(self._body.forward).parameters)

    @property
    def _block(self) -> Any:
        """What embeds the tokens and gives them positions, where that is one module."""
        return getattr(self._body, "embeddings", None)

    def _install(self) -> None:
        if self._is_pair:
            stacks = TwoStacks(self._model, self._active, self._embedded)
            self._swaps += stacks.install()
        else:
            self._swaps.append(Swap(self._body, self._run_body))
            if self._block is not None:
                self._swaps.append(Swap(self._block, self._run_block))
        self._swaps.append(Swap(self._model, self._run_model, (FLAGS,)))

    def _active(self) -> Standing | None:
        self._here.entered = True
        return self.current.now

    def _run_model(self, original: Forward, call: Call) -> Any:
        """The whole model: what only it knows of the call."""
        self._here.flags, self._here.entered = call.pop(FLAGS, None), False
        found = self.current.now
        # a loss counts the first real token, which only the last virtual position foretells
        rows = [] if found is None or self._whole or self._is_pair else _inserted(found)
        if self._keep:
            inputs.shift_spans(call, rows)
        self._here.labels = bool(rows) and inputs.extend_labels(call, rows)
        try:
            labelled = self._here.labels
            output = self._labelled(original, call, rows) if labelled else original(**call)
        finally:
            self._here.flags, self._here.labels = None, False
        if found is not None and not self._here.entered:
            name = type(self._model).__name__
            raise MismatchError(f"{name} does not call what prefixes and prompts are put before")
        return output

    def _labelled(self, original: Forward, call: Call, rows: Rows) -> Any:
        """The model with a loss over all positions, and outputs without virtual ones."""
        wanted = call.pop("return_dict", None)
        output = original(**call, return_dict=True)
        for start, n in [] if self._keep else reversed(rows):
            output = outputs.cut(output, start, n, outputs.HEAD)
        return self._as_wanted(output, wanted)

    def _as_wanted(self, output: Any, wanted: bool | None) -> Any:
        as_dict = self._model.config.return_dict if wanted is None else wanted
        return output if as_dict else output.to_tuple()

    def _run_body(self, original: Forward, call: Call) -> Any:
        """The model without its head: it sees what stands in front, and its head does not."""
        found, cache = self._active(), call.get(CACHE)
        if found is None:
            caches.require_own(cache, None)
            return original(**call)
        require_kept(self._body, found)
        seen = caches.length(cache)
        self._here.starts = seen == 0
        if not self._here.starts:
            caches.require_own(cache, found.activation)
        _, length = inputs.shape(call)
        past = max(seen - found.held, 0)
        self._move(call, found, past)
        inputs.extend_mask(call, MASK, found.held, past + length, _tokens(call))
        if self._here.starts:
            self._start(call, found)
        inputs.require_room(found.shift + past + length, self._model.config, self._reserved())
        wanted, returns = call.pop("return_dict", None), cache is not None or self._caches(call)
        output = original(**call, return_dict=True)
        output = output if returns else outputs.without(output, CACHE)
        caches.mark(output.get(CACHE), found.activation)
        if self._here.starts:
            output = self._cut(output, found)
        return self._as_wanted(output, wanted)

    def _cut(self, output: Any, found: Standing) -> Any:
        """The output as a head expects it. A label of a whole sequence comes from its first
        position in an encoder, which virtual tokens take, and elsewhere from the last real one."""
        if self._here.labels or (self._keep and (self._encodes or not self._whole)):
            return output
        names = outputs.LAYERS if self._whole and self._encodes else outputs.ALL
        for start, n in reversed(_inserted(found)):
            output = outputs.cut(output, start, n, names)
        return output

    def _caches(self, call: Call) -> bool:
        """Whether a call without a cache returns one: what a prefix was written to is no other."""
        config, wanted = self._model.config, call.get("use_cache")
        wanted = getattr(config, "use_cache", False) if wanted is None else wanted
        return bool(wanted) and not self._encodes

    @property
    def _whole(self) -> bool:
        """Whether it labels a sequence as a whole."""
        return type(self._model).__name__.endswith(WHOLE)

    @property
    def _is_pair(self) -> bool:
        return bool(self._model.config.is_encoder_decoder)

    @property
    def _encodes(self) -> bool:
        """Whether every token sees all others, so that nothing is kept for later ones."""
        return self._block is not None and not getattr(self._model.config, "is_decoder", False)

    def _move(self, call: Call, found: Standing, past: int) -> None:
        """The positions of real tokens, behind everything they stand behind."""
        if POSITIONS not in self._names:
            if found.held:
                inputs.require_aligned(call, self._model.config.model_type)
            return
        if call.get(POSITIONS) is None and found.n_keys > found.n_shifting and self._block is None:
            tokens = _tokens(call)
            length = tokens.shape[1]
            call[POSITIONS] = torch.arange(past, past + length, device=tokens.device)[None]
        inputs.shift_positions(call, found.shift, found.n_front if self._here.starts else 0)

    def _start(self, call: Call, found: Standing) -> None:
        """What stands in front, where a sequence starts."""
        batch, _ = inputs.shape(call)
        dtype = self._body.get_input_embeddings().weight.dtype
        if found.flagged is not None or found.front is not None:
            embeds = self._embedded(call, self._body, found)
            dtype = embeds.dtype
            if found.front is not None:
                inputs.put_in_front(call, found.front, embeds)
        if found.prefixes:
            if call.get(CACHE) is None:
                # sliding windows need to be told from the config; encoders have none
                call[CACHE] = DynamicCache(config=self._model.config)
            caches.fill(call[CACHE], found.prefixes, batch, dtype)

    def _embedded(self, call: Call, stack: Any, found: Standing) -> Tensor:
        """The tokens as vectors, those that the caller marked replaced."""
        embeds: Tensor | None = call.get(EMBEDS)
        if embeds is None:
            embeds = stack.get_input_embeddings()(call["input_ids"])
        if found.flagged is not None:
            embeds = inputs.flag(embeds, found.flagged, self._here.flags)
        call[EMBEDS], call["input_ids"] = embeds, None
        return embeds

    def _run_block(self, original: Forward, call: Call) -> Any:
        """The embedding block: positions count prefixes that shift; rows follow what it gives."""
        found = self.current.now
        if found is None:
            return original(**call)
        if call.get(LENGTH):
            call[LENGTH] -= found.n_keys - found.n_shifting
        mask = call.get("mask")
        if self._here.starts and found.embedded and isinstance(mask, Tensor):
            call["mask"] = mask[:, found.n_embedded :]  # of what is embedded, as the caller gave it
        embedded: Tensor = original(**call)
        for rows, behind_first in found.embedded if self._here.starts else ():
            new = rows.to(embedded.device, embedded.dtype).expand(len(embedded), *rows.shape)
            start = int(behind_first)
            embedded = torch.cat([embedded[:, :start], new, embedded[:, start:]], dim=1)
        return embedded

    def _reserved(self) -> int:
        """Positions that no token gets: RoBERTa's first ones, up to that of padding."""
        padding = getattr(self._block, "padding_idx", None)
        return padding + 1 if isinstance(padding, int) else 0


def _tokens(call: Call) -> Tensor:
    ids: Tensor | None = call.get("input_ids")
    embeds: Tensor = call[EMBEDS] if ids is None else ids
    return embeds


def _inserted(found: Standing) -> Rows:
    """(start, number) of all rows that became positions, in the order they were put in."""
    front = [(0, found.n_front)] if found.n_front else []
    return front + [(int(behind), len(rows)) for rows, behind in found.embedded]
