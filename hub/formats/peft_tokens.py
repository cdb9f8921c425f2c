"""`peft_type: TRAINABLE_TOKENS`.  peft 0.21 `tuners/trainable_tokens/config.py`."""

from __future__ import annotations

from collections.abc import Collection

from adapterkit.hub.fields import TokensFields
from adapterkit.hub.formats.config import ConfigReader
from adapterkit.hub.formats.peft_config import replaced
from adapterkit.hub.formats.peft_type import PeftType


def read(reader: ConfigReader, names: Collection[str]) -> TokensFields:
    fields = replaced(reader, "token_indices")
    if not fields.tokens:
        reader.fault("token_indices", "a list of token ids")
    reader.done()
    return TokensFields(fields)


TRAINABLE_TOKENS = PeftType(
    kind="trainable_tokens",
    endings={},
    fields=read,
    known=frozenset({"token_indices", "ensure_weight_tying"}),
    inert=frozenset({"init_weights"}),
)
