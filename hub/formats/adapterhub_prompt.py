"""AdapterHub's `prompt_tuning`.  adapters 1.3 `methods/prompt_tuning.py`."""

from __future__ import annotations

from adapterkit.hub.fields import PromptFields
from adapterkit.hub.formats.adapterhub_type import Architecture, Key, Outer, Paths, Place
from adapterkit.hub.formats.config import ConfigReader
from adapterkit.hub.formats.peft_prompt import MAX_COUNT

# Where the rows stand: behind the embedding block in both, so that they have no position.
COMBINE = {"prefix": "embedded", "prefix_after_bos": "embedded_after_first"}


def place(key: Key) -> Place | None:
    own = key.holder == "prompt_tunings" and key.rest == "prompt_embedding.weight"
    return ("", "rows") if own else None


def read(reader: ConfigReader, outer: Outer, paths: Paths) -> PromptFields:
    length = reader.count("prompt_length", 10, MAX_COUNT)
    combine = reader.choice("combine", "prefix", tuple(COMBINE))
    return PromptFields(length, length, outer.width, COMBINE[combine])


PROMPT = Architecture(
    kind="prompt",
    place=place,
    fields=read,
    known=frozenset(["prompt_length", "combine"]),
    inert=frozenset(
        ["prompt_init", "prompt_init_text", "random_uniform_scale", "init_weights_seed"]
    ),
)
