"""Prefixes and virtual tokens of an encoder-decoder: rows before what the encoder embeds, keys in
front of the decoder's attention to itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from adapterkit.hub.compose import caches, inputs, outputs
from adapterkit.hub.compose.inputs import Call
from adapterkit.hub.compose.possible import require_kept
from adapterkit.hub.compose.standing import Standing
from adapterkit.hub.compose.swap import Forward, Swap

CACHE, MASK, DECODER = "past_key_values", "attention_mask", "decoder_"
Embed = Callable[[Call, Any, Standing], Tensor]


class TwoStacks:
    """standing: what is active now. embed: the tokens of a call as vectors."""

    def __init__(self, model: Any, standing: Callable[[], Standing | None], embed: Embed) -> None:
        self._model, self._standing, self._embed = model, standing, embed

    def install(self) -> list[Swap]:
        encoder = self._model.get_encoder()
        self._encoder = encoder
        return [Swap(encoder, self._run_encoder), Swap(self._model.base_model, self._run_pair)]

    def _run_encoder(self, original: Forward, call: Call) -> Any:
        """generate() calls the encoder alone, forward() from within: its mask is longer then."""
        found = self._standing()
        if found is None or (found.front is None and found.flagged is None):
            return original(**call)
        _, length = inputs.shape(call)
        mask = call.get(MASK)
        if isinstance(mask, Tensor) and mask.shape[-1] != length + found.n_front:
            inputs.extend_mask(call, MASK, found.n_front, length, mask)
        embeds = self._embed(call, self._encoder, found)
        if found.front is not None:
            inputs.put_in_front(call, found.front, embeds)
        return original(**call)

    def _run_pair(self, original: Forward, call: Call) -> Any:
        found, cache = self._standing(), call.get(CACHE)
        if found is None:
            caches.require_own(cache, None)
            return original(**call)
        require_kept(self._model.base_model, found)
        seen = caches.length(cache)
        if seen:
            caches.require_own(cache, found.activation)
        if found.n_front and call.get(MASK) is not None:
            self._extend_encoder_mask(call, found)
        if found.n_keys:
            self._start_decoder(call, found, seen)
        wanted, kept = call.pop("return_dict", None), call.get("use_cache")
        kept = self._model.config.use_cache if kept is None else kept
        output = original(**call, return_dict=True)
        if cache is None and not kept:  # the one that a prefix was written to is no other's
            output = outputs.without(output, CACHE)
        caches.mark(output.get(CACHE), found.activation)
        as_dict = self._model.config.return_dict if wanted is None else wanted
        return output if as_dict else output.to_tuple()

    def _extend_encoder_mask(self, call: Call, found: Standing) -> None:
        encoded = call.get("encoder_outputs")
        length = (
            inputs.shape(call)[1] if encoded is None else encoded[0].shape[1] - found.n_front
        )
        inputs.extend_mask(call, MASK, found.n_front, length, call[MASK])

    def _start_decoder(self, call: Call, found: Standing, seen: int) -> None:
        batch, length = self._decoded(call)
        past = max(seen - found.n_keys, 0)
        if (mask := call.get(DECODER + MASK)) is not None:
            inputs.extend_mask(call, DECODER + MASK, found.n_keys, past + length, mask)
        inputs.require_room(found.n_shifting + past + length, self._model.config, 0)
        if seen == 0:
            if call.get(CACHE) is None:
                call[CACHE] = EncoderDecoderCache(DynamicCache(), DynamicCache())
            dtype: torch.dtype = self._model.get_input_embeddings().weight.dtype
            caches.fill(call[CACHE].self_attention_cache, found.prefixes, batch, dtype)

    def _decoded(self, call: Call) -> tuple[int, int]:
        """(batch, length) of what is decoded; labels stand for it where nothing else does."""
        named = ("decoder_input_ids", "decoder_inputs_embeds")
        labels = call.get("labels")
        if labels is not None and all(call.get(name) is None for name in named):
            return labels.shape[0], labels.shape[1]
        return inputs.shape(call, DECODER)
