"""Prefixes and virtual tokens of a model of one stack: keys in front of its attentions, rows before
what it embeds or behind what embeds it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from adapterkit.hub.compose import caches, inputs, outputs
from adapterkit.hub.compose.inputs import Call
from adapterkit.hub.compose.possible import block_of, body_of, encodes, labels_whole, require_kept
from adapterkit.hub.compose.running import Running, embedded
from adapterkit.hub.compose.standing import Mix, Standing
from adapterkit.hub.compose.swap import Forward, Swap

CACHE, MASK, POSITIONS = "past_key_values", "attention_mask", "position_ids"
EMBEDS, TYPES = "inputs_embeds", "token_type_ids"


class OneStack:
    """standing: what is active now. here: the forward that runs. keep: virtual positions stay in
    the outputs."""

    def __init__(
        self, model: Any, standing: Callable[[], Standing | None], here: Running, *, keep: bool
    ) -> None:
        self._model, self._standing, self._here, self._keep = model, standing, here, keep
        self._body = body_of(model)
        self._block = block_of(self._body)
        self._names = set(inspect.signature(self._body.forward).parameters)

    def install(self) -> list[Swap]:
        swaps = [Swap(self._body, self._run_body)]
        if self._block is not None:
            swaps.append(Swap(self._block, self._run_block))
        return swaps

    def _run_body(self, original: Forward, call: Call) -> Any:
        """The model without its head: it sees what stands in front, and its head does not."""
        found, cache = self._standing(), call.get(CACHE)
        if found is None:
            caches.require_own(cache, None)
            return original(**call)
        require_kept(self._body, found)
        seen = caches.length(cache)
        starts = self._here.starts = seen == 0
        if not starts:
            caches.require_own(cache, found.activation)
        batch, length = inputs.shape(call)
        past, tokens = max(seen - found.held, 0), inputs.tokens(call)
        self._move(call, found, past)
        hidden = found.spread(found.seen, batch, tokens.device)
        inputs.extend_mask(call, MASK, hidden, past + length, tokens)
        if starts:
            self._start(call, found)
        inputs.require_room(found.shift + past + length, self._model.config, self._reserved())
        if found.has_gap:
            inputs.require_near(found.held + past + length, self._model.config)
        wanted, returns = call.pop("return_dict", None), cache is not None or self._caches(call)
        ends = found.spread(found.pads, batch, tokens.device) if self._encodes else None
        with found.noted(found.n_rows if starts else 0, ends):
            output = original(**call, return_dict=True)
        output = output if returns else outputs.without(output, CACHE)
        caches.mark(output.get(CACHE), found.activation)
        if starts and found.n_rows:
            output = self._cut(output, found, batch, length)
        return outputs.as_wanted(output, wanted, self._model.config)

    def _cut(self, output: Any, found: Standing, batch: int, length: int) -> Any:
        """The output as a head expects it. A label of a whole sequence comes from its first
        position in an encoder, which virtual tokens take, and elsewhere from the last real one."""
        names = outputs.LAYERS if self._whole and self._encodes else outputs.ALL
        if self._here.labels or (self._keep and (self._encodes or not self._whole)):
            if not (self._encodes and found.is_padded):
                return output
            every = torch.arange(found.n_rows + length)
            seats = (every - found.pads[:, None]) % len(every)  # padding in front again
        else:
            seats = found.seats(length, padded=not self._encodes)
        return outputs.taken(output, found.spread(seats, batch), names)

    def _caches(self, call: Call) -> bool:
        """Whether a call without a cache returns one: what a prefix was written to is no other."""
        config, wanted = self._model.config, call.get("use_cache")
        wanted = getattr(config, "use_cache", False) if wanted is None else wanted
        return bool(wanted) and not self._encodes

    @property
    def _encodes(self) -> bool:
        return encodes(self._model, self._body)

    @property
    def _whole(self) -> bool:
        return labels_whole(self._model)

    def _move(self, call: Call, found: Standing, past: int) -> None:
        """The positions of real tokens, behind everything they stand behind."""
        family = self._model.config.model_type
        if POSITIONS not in self._names:
            if found.held:
                inputs.require_aligned(call, family)
            return
        batch, _ = inputs.shape(call)
        if call.get(POSITIONS) is None and found.is_moved:
            vectors = found.numbers(lambda mix: mix.n_front + mix.n_flagged) > 0
            vectors = found.spread(vectors, batch, inputs.tokens(call).device)
            call[POSITIONS] = inputs.positions(call, family, past, self._padding, vectors)
        shift = found.spread(found.numbers(lambda mix: mix.shift), batch)
        n_front = found.n_front if self._here.starts else 0
        inputs.shift_positions(call, shift, n_front, self._reserved())

    def _start(self, call: Call, found: Standing) -> None:
        """What stands in front, where a sequence starts."""
        batch, _ = inputs.shape(call)
        dtype = self._body.get_input_embeddings().weight.dtype
        if found.n_flagged or found.n_front:
            embeds = embedded(call, self._body, found, self._here.flags)
            dtype = embeds.dtype
            if found.n_front:
                inputs.put_in_front(call, found.spread(found.front, batch), embeds)
        if found.own:
            if call.get(CACHE) is None:
                # sliding windows need to be told from the config; encoders have none
                call[CACHE] = DynamicCache(config=self._model.config)
            caches.fill(call[CACHE], found.prefixes(batch), batch, dtype)
        if found.is_padded and self._encodes:
            self._settle(call, found, batch)

    def _settle(self, call: Call, found: Standing, batch: int) -> None:
        """Padding in front goes to the end."""
        device = inputs.tokens(call).device
        pads = found.spread(found.pads, batch, device)
        keys, rest = call[MASK].split([found.n_keys, call[MASK].shape[1] - found.n_keys], dim=1)
        call[MASK] = torch.cat([keys, inputs.rolled(rest, pads)], dim=1)
        pads = found.spread(found.numbers(lambda mix: found.n_front - mix.n_front), batch, device)
        for name in (EMBEDS, TYPES, POSITIONS):
            if found.n_front and call.get(name) is not None:
                call[name] = inputs.rolled(call[name], pads)

    def _run_block(self, original: Forward, call: Call) -> Any:
        """The embedding block: rows follow what it gives."""
        found = self._standing()
        if found is None or not (self._here.starts and found.has_embedded):
            return original(**call)
        mask = call.get("mask")
        if isinstance(mask, Tensor):  # of what is embedded, as the caller gave it
            own = functional.pad(mask[:, found.n_keys :], (0, found.n_front))
            n = found.spread(found.numbers(lambda mix: mix.n_embedded), len(mask), mask.device)
            call["mask"] = inputs.rolled(own, n)[:, : mask.shape[1] - found.held + found.n_front]
        given: Tensor = original(**call)
        batch, length = given.shape[0], given.shape[1] - found.n_front
        made = given.new_zeros(batch, found.n_rows + length, given.shape[2])
        for mix, rows in found.parts(batch, given.device):
            whole = _inserted(self._own(given[rows], mix.n_front + length), mix)
            self._own(made, whole.shape[1])[rows] = whole
        return made

    def _own(self, values: Tensor, n: int) -> Tensor:
        """values (rows, length, width) but for padding, which is at the end in an encoder."""
        return values[:, :n] if self._encodes else values[:, values.shape[1] - n :]

    @property
    def _padding(self) -> int | None:
        """The position of padding, RoBERTa's last one that no token gets."""
        padding = getattr(self._block, "padding_idx", None)
        return padding if isinstance(padding, int) else None

    def _reserved(self) -> int:
        """Positions that no token gets."""
        return 0 if self._padding is None else self._padding + 1


def _inserted(values: Tensor, mix: Mix) -> Tensor:
    for rows, behind_first in mix.embedded:
        new = rows.to(values.device, values.dtype).expand(len(values), *rows.shape)
        start = int(behind_first)
        values = torch.cat([values[:, :start], new, values[:, start:]], dim=1)
    return values
