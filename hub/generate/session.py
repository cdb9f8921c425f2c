"""A base with adapters on it that writes text, as it comes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, LogitsProcessorList

from adapterkit.hub.generate.prompts import Chosen, Prompt
from adapterkit.hub.generate.stream import Finite, Stream, Write
from adapterkit.registry.errors import AdapterError, InvalidError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adapterkit.hub.compose.handle import Adapters

# Why a text ends: the model ended it, it has all tokens asked for, or all the model has room for.
STOP, LENGTH, FULL = "stop", "length", "full"


@dataclass(frozen=True)
class Settings:
    """temperature: 0 takes the likeliest token each time. top_p, top_k: None is as the base's
    generation_config.json says, and so is all that is not here. Raises InvalidError."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": ("1 or more", self.max_new_tokens >= 1),
            "temperature": ("0 or more", 0 <= self.temperature < math.inf),
            "top_p": ("above 0, at most 1", self.top_p is None or 0 < self.top_p <= 1),
            "top_k": ("1 or more", self.top_k is None or self.top_k >= 1),
            "seed": ("from 0 to 2**63 - 1", 0 <= self.seed < 2**63),
        }
        faults = [
            f"{name} is {getattr(self, name)}, expected {expected}"
            for name, (expected, holds) in rules.items()
            if not holds
        ]
        if self.temperature == 0 and (self.top_p, self.top_k) != (None, None):
            faults.append("top_p and top_k choose among tokens that a temperature draws from")
        if faults:
            raise InvalidError("; ".join(faults))


@dataclass(frozen=True)
class Generated:
    """weights: what was active. n_tokens: of the text and its end. end: why it ends there."""

    weights: Mapping[str, float]
    text: str
    n_tokens: int
    end: str


@dataclass(frozen=True)
class Session:
    """A model with adapters on it, and what it is asked. weights: of the composition, by name."""

    model: PreTrainedModel
    adapters: Adapters
    weights: Mapping[str, float]
    chosen: Chosen
    prompt: Prompt

    def compositions(self) -> list[Mapping[str, float]]:
        """The base, each adapter alone with its weight, and all of them."""
        alone = [{name: weight} for name, weight in self.weights.items()]
        return [{}, *alone, *([self.weights] if len(alone) > 1 else [])]

    def generate(self, weights: Mapping[str, float], settings: Settings, write: Write) -> Generated:
        """What the base with `weights` makes of the prompt; the random state stays as it was.

        write: called with each piece of the text as soon as it is whole.
        """
        self.adapters.activate(weights)
        most = self._room()
        n = settings.max_new_tokens if most is None else min(most, settings.max_new_tokens)
        stream = Stream(self.chosen.tokenizer, write)
        device, prompt = self.model.device, self.prompt
        with _seeded(device, settings.seed), enough_memory():
            self.model.generate(  # type: ignore[operator]
                prompt.ids.to(device), attention_mask=prompt.mask.to(device), streamer=stream,
                logits_processor=LogitsProcessorList([Finite()]),
                max_new_tokens=n, **self._fixed(), **_drawing(settings),
            )  # fmt: skip
        ended = stream.ids[-1:] and stream.ids[-1] in self._ends()
        end = STOP if ended else LENGTH if n == settings.max_new_tokens else FULL
        return Generated(dict(weights), stream.text, len(stream.ids), end)

    def _ends(self) -> list[int]:
        """Ids that end a text: those of the model, and that of an adapter's own tokenizer."""
        own: Any = getattr(self.model.generation_config, "eos_token_id", None)
        found = set(own) if isinstance(own, list) else {own}
        return sorted((found | {self.chosen.tokenizer.eos_token_id}) - {None})

    def _fixed(self) -> dict[str, Any]:
        """What the base's generation_config.json does not decide: one text, and a cache that grows,
        as prefixes need. Whatever it says of lengths gives way to ours."""
        ends = self._ends()
        padding = getattr(self.model.generation_config, "pad_token_id", None)
        found: dict[str, Any] = {"num_beams": 1, "num_return_sequences": 1, "max_length": None}
        found |= {"cache_implementation": "dynamic", "eos_token_id": ends or None}
        return found | {"pad_token_id": ends[0] if padding is None and ends else padding}

    def _room(self) -> int | None:
        """Tokens that still have a position; None where the model counts none."""
        config: Any = self.model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        if not isinstance(limit, int) or limit <= 0:
            return None
        pair, n = bool(self.model.config.is_encoder_decoder), self.prompt.size
        virtual = self._virtual(pair)
        left = limit - virtual - (1 if pair else n)
        if left < 1 or n > limit:
            more = f" and {virtual} virtual ones" if virtual else ""
            raise InvalidError(
                f"the prompt has {n} tokens{more}, but the model has {limit} positions"
            )
        return left

    @torch.no_grad()
    def _virtual(self, pair: bool) -> int:
        """Positions that active prefixes and virtual tokens take: what one token leaves behind."""
        if not self.adapters.active:
            return 0
        ids = self.prompt.ids[:, :1].to(self.model.device)
        call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        call |= {"decoder_input_ids": ids} if pair else {}
        cache = getattr(self.model(**call, use_cache=True), "past_key_values", None)
        return int(cache.get_seq_length()) - 1 if isinstance(cache, Cache) else 0


def _drawing(settings: Settings) -> dict[str, Any]:
    if settings.temperature == 0:
        return {"do_sample": False}
    chosen = {"top_p": settings.top_p, "top_k": settings.top_k}
    drawn = {name: value for name, value in chosen.items() if value is not None}
    return drawn | {"do_sample": True, "temperature": settings.temperature}


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def enough_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise AdapterError(
            "the device has not enough memory", hint="--quantization nf4, or --device cpu"
        ) from error
