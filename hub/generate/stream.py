"""Text as a model writes it, token by token."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from adapterkit.registry.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a decoder shows for a character that later tokens complete.
INCOMPLETE = "\ufffd"
Write = Callable[[str], object]


class Stream(BaseStreamer):
    """Passes text on as soon as its characters are whole. (Those of transformers cut at words, and
    lose the space of a word behind a line break where the tokenizer writes it into the word.)"""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Write) -> None:
        self.ids: list[int] = []
        self._tokenizer, self._write = tokenizer, write
        self._started, self._written = False, 0

    @property
    def text(self) -> str:
        found = self._tokenizer.decode(
            self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(found)

    def put(self, value: Tensor) -> None:
        if not self._started:  # the prompt, or the first token of every decoder
            self._started = True
            return
        self.ids += value.flatten().tolist()
        text = self.text
        if not text.endswith(INCOMPLETE):
            self._pass_on(text)

    def end(self) -> None:
        self._pass_on(self.text)

    def _pass_on(self, text: str) -> None:
        if len(text) > self._written:
            self._write(text[self._written :])
            self._written = len(text)


class Finite(LogitsProcessor):
    """Ends it where nothing was computed: what is chosen among NaN is no text of the model's."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool((scores < math.inf).all()):
            raise AdapterError(
                "the model computes NaN or infinity", hint="--dtype float32, or smaller weights"
            )
        return scores
