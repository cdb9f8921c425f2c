"""`peft_type: PREFIX_TUNING`, `PROMPT_TUNING` and `P_TUNING`.  peft 0.21 `config.py`
(PromptLearningConfig) and `peft_model.py` (get_prompt)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from adapterkit.hub.fields import PrefixFields, PromptFields
from adapterkit.hub.formats.config import ConfigReader
from adapterkit.hub.formats.peft_config import replaced
from adapterkit.hub.formats.peft_keys import PREFIX, ROOT
from adapterkit.hub.formats.peft_type import PeftType
from adapterkit.hub.matching import Targets

LENGTH, PARTS, HEADS = "num_virtual_tokens", "num_transformer_submodules", "num_attention_heads"
LAYERS, WIDTH = "num_layers", "token_dim"
PROMPT = "prompt_embeddings"
# What no honest config has more of.
MAX_COUNT = 1 << 20

KNOWN = frozenset({LENGTH, PARTS, HEADS, LAYERS, WIDTH})
INITIAL = frozenset({"init_weights", "encoder_hidden_size"})


def _count(reader: ConfigReader, field: str) -> int | None:
    """PEFT fills these in before it saves; a config by hand may leave them to the shapes."""
    if reader.config.get(field) is None:
        return None
    return reader.count(field, 1, MAX_COUNT)


def _length(reader: ConfigReader) -> int:
    if LENGTH not in reader.config:
        reader.fault(LENGTH, f"an integer from 1 to {MAX_COUNT}")
    return reader.count(LENGTH, 1, MAX_COUNT)


def _parts(reader: ConfigReader) -> int:
    """1, or 2 for an encoder-decoder whose file was made for both of its stacks."""
    return 1 if reader.config.get(PARTS) is None else reader.count(PARTS, 1, 2)


def read_prefix(reader: ConfigReader, names: Collection[str]) -> PrefixFields:
    reader.flag("prefix_projection")  # checked only: its output is what is stored
    fields = PrefixFields(
        length=_length(reader),
        layers=_count(reader, LAYERS),
        heads=_count(reader, HEADS),
        width=_count(reader, WIDTH),
        doubled=_parts(reader) == 2,
        replaced=replaced(reader),
    )
    reader.done()
    return fields


def read_prompt(reader: ConfigReader, names: Collection[str]) -> PromptFields:
    for field in (LAYERS, HEADS):
        _count(reader, field)  # checked only: of the base, not of the prompt
    length = _length(reader)
    fields = PromptFields(
        length=length,
        stored=length * _parts(reader),
        width=_count(reader, WIDTH),
        replaced=replaced(reader),
    )
    reader.done()
    return fields


def _places(role: str) -> Callable[[Iterable[str], Targets], dict[str, tuple[str, str]]]:
    """The one tensor these types have, which has no prefix, and heads, which lack half of it."""

    def places(keys: Iterable[str], targets: Targets) -> dict[str, tuple[str, str]]:
        found = {PROMPT: ("", role)}
        for key in keys:
            module, _, parameter = key.removeprefix(ROOT).rpartition(".")
            own = key.startswith(ROOT) and not key.startswith(PREFIX)
            if own and module and targets.is_saved(module):
                found[key] = module, f"replace.{parameter}"
        return found

    return places


PREFIX_TUNING = PeftType(
    kind="prefix",
    endings={},
    places=_places("self.prefix"),
    fields=read_prefix,
    known=KNOWN | {"prefix_projection"},
    inert=INITIAL,
)

PROMPT_TUNING = PeftType(
    kind="prompt",
    endings={},
    places=_places("rows"),
    fields=read_prompt,
    known=KNOWN,
    inert=frozenset(
        {
            "prompt_tuning_init",
            "prompt_tuning_init_text",
            "tokenizer_name_or_path",
            "tokenizer_kwargs",
        }
    ),
)

P_TUNING = PeftType(
    kind="prompt",
    endings={},
    places=_places("rows"),
    fields=read_prompt,
    known=KNOWN,
    inert=frozenset(
        {
            "encoder_reparameterization_type",
            "encoder_hidden_size",
            "encoder_num_layers",
            "encoder_dropout",
        }
    ),
)
