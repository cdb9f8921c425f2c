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
from adapterkit.hub.compose.possible import SEEN, places, require_kept
from adapterkit.hub.compose.running import Running, embedded
from adapterkit.hub.compose.standing import Standing
from adapterkit.hub.compose.swap import Forward, Swap

CACHE, MASK, DECODER = "past_key_values", "attention_mask", "decoder_"
EMBEDS, POSITIONS = "inputs_embeds", "position_ids"


class TwoStacks:
    """standing: what is active now. here: the forward that runs."""

    def __init__(self, model: Any, standing: Callable[[], Standing | None], here: Running) -> None:
        self._model, self._standing, self._here = model, standing, here

    def install(self) -> list[Swap]:
        encoder = self._model.get_encoder()
        self._encoder = encoder
        swaps = [Swap(encoder, self._run_encoder), Swap(self._model.base_model, self._run_pair)]
        if (module := places(self._model)) is not None:
            swaps.append(Swap(module, self._run_positions))
        return swaps

    def _run_encoder(self, original: Forward, call: Call) -> Any:
        """generate() calls the encoder alone, forward() from within: its mask is longer then."""
        found = self._standing()
        if found is None or not (found.n_front or found.n_flagged):
            return original(**call)
        batch, length = inputs.shape(call)
        mask = call.get(MASK)
        is_ready = isinstance(mask, Tensor) and mask.shape[-1] == length + found.n_front
        if not is_ready and (mask is not None or found.is_padded):
            self._extend_encoder_mask(call, found, batch, length)
        embeds = embedded(call, self._encoder, found, self._here.flags)
        if found.n_front:
            inputs.put_in_front(call, found.spread(found.front, batch, embeds.device), embeds)
            call[EMBEDS] = self._settled(call[EMBEDS], found)
        with found.noted(found.n_front):
            return original(**call)

    def _settled(self, values: Tensor, found: Standing) -> Tensor:
        """Padding of what stands in front goes to the end, since positions count from the start."""
        if not found.is_padded:
            return values
        return inputs.rolled(values, found.spread(found.pads, len(values), values.device))

    def _run_pair(self, original: Forward, call: Call) -> Any:
        found, cache = self._standing(), call.get(CACHE)
        if found is None:
            caches.require_own(cache, None)
            return original(**call)
        require_kept(self._model.base_model, found)
        seen = caches.length(cache)
        if seen:
            caches.require_own(cache, found.activation)
        if found.n_front and (call.get(MASK) is not None or found.is_padded):
            self._extend_encoder_mask(call, found, *self._encoded(call, found))
        if found.n_keys:
            self._start_decoder(call, found, seen)
        wanted, kept = call.pop("return_dict", None), call.get("use_cache")
        kept = self._model.config.use_cache if kept is None else kept
        output = original(**call, return_dict=True)
        if cache is None and not kept:  # the one that a prefix was written to is no other's
            output = outputs.without(output, CACHE)
        caches.mark(output.get(CACHE), found.activation)
        return outputs.as_wanted(output, wanted, self._model.config)

    def _encoded(self, call: Call, found: Standing) -> tuple[int, int]:
        """(batch, length) of what is encoded, or was."""
        if (encoded := call.get("encoder_outputs")) is None:
            return inputs.shape(call)
        return encoded[0].shape[0], encoded[0].shape[1] - found.n_front

    def _extend_encoder_mask(self, call: Call, found: Standing, batch: int, length: int) -> None:
        like = call.get(MASK)
        if not isinstance(like, Tensor):
            like = torch.ones(batch, length, dtype=torch.long, device=self._device)
        seen = found.spread(found.seen[:, found.n_keys :], batch, like.device)
        inputs.extend_mask(call, MASK, seen, length, like)
        call[MASK] = self._settled(call[MASK], found)

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._model.get_input_embeddings().weight.device
        return device

    def _start_decoder(self, call: Call, found: Standing, seen: int) -> None:
        batch, length = self._decoded(call)
        past = max(seen - found.n_keys, 0)
        keys = found.seen[:, : found.n_keys]
        if (mask := call.get(DECODER + MASK)) is not None or not bool(keys.all()):
            keys = found.spread(keys, batch, self._device)
            like = torch.empty(batch, 0, device=self._device) if mask is None else mask
            inputs.extend_mask(call, DECODER + MASK, keys, past + length, like)
        shift = max(mix.n_shifting for mix in found.mixes)
        inputs.require_room(shift + past + length, self._model.config, 0)
        if seen == 0:
            if call.get(CACHE) is None:
                call[CACHE] = EncoderDecoderCache(DynamicCache(), DynamicCache())
            dtype: torch.dtype = self._model.get_input_embeddings().weight.dtype
            store = call[CACHE].self_attention_cache
            caches.fill(store, found.prefixes(batch), batch, dtype)

    def _decoded(self, call: Call) -> tuple[int, int]:
        """(batch, length) of what is decoded; labels stand for it where nothing else does."""
        named = ("decoder_input_ids", "decoder_inputs_embeds")
        labels = call.get("labels")
        if labels is not None and all(call.get(name) is None for name in named):
            return labels.shape[0], labels.shape[1]
        return inputs.shape(call, DECODER)

    def _run_positions(self, original: Forward, call: Call) -> Any:
        """The decoder's positions, which the library counts by what the longest row has held."""
        found = self._standing()
        if found is None:
            return original(**call)
        ahead = [found.n_keys - mix.n_shifting for mix in found.mixes]

        def placed(n: int) -> Tensor:
            given = {name: call.get(name) for name in (SEEN, POSITIONS)}
            moved = {name: value - n for name, value in given.items() if value is not None}
            made: Tensor = original(**{**call, **moved})
            return made if made.ndim == 3 else made[None]

        return found.chosen(ahead, placed) if any(ahead) else original(**call)
