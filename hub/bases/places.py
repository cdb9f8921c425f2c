"""Where in a layer small networks are put: one row per model family. Names as in transformers 5.

In a sub-block of a layer, h is what its last linear gives, x0 what is added to it, and in post-norm
families a layer norm follows: y = LN(h + x0), else y = h + x0. A family without a row is refused,
never guessed: which module is which cannot be seen from names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from adapterkit.hub.bases.base import Base, Module

ATTENTION, CROSS, OUTPUT, EMBEDDINGS = "attention", "cross_attention", "output", "embeddings"
PAGE = "docs/add-a-family.md"


@dataclass(frozen=True)
class Place:
    """One place. A path that is relative in a row is absolute in what `places` returns.

    h: the module whose output is h; of a tuple, its first entry. x0: the module whose first input
    is x0. norm: the post layer norm, "" where the family has none. entry: h is the module's input.
    """

    h: str
    x0: str = ""
    norm: str = ""
    entry: bool = False

    @property
    def sized(self) -> str:
        """A norm with as many values as h has."""
        return self.norm or self.x0


@dataclass(frozen=True)
class Layers:
    """The layers of one stack: its path behind the body's prefix, and the places in each."""

    path: str
    places: Mapping[str, Place]


@dataclass(frozen=True)
class Row:
    """stacks: in the order in which their layers are counted. embeddings: what the first layer
    gets, with a norm or an embedding that tells its width; "" where it is no module's output."""

    stacks: tuple[Layers, ...]
    embeddings: str
    width: str


@dataclass(frozen=True)
class Found:
    """A place of a base. layer: the path of its layer; number: counted over all stacks."""

    layer: str
    name: str
    number: int
    width: int
    place: Place

    @property
    def path(self) -> str:
        """What an adapter calls it."""
        return f"{self.layer}.{self.name}" if self.layer else self.name


_BERT = Row(
    (
        Layers(
            "encoder.layer",
            {
                ATTENTION: Place(
                    "attention.output.dropout", "attention", "attention.output.LayerNorm"
                ),
                OUTPUT: Place("output.dropout", "intermediate", "output.LayerNorm"),
            },
        ),
    ),
    "embeddings",
    "embeddings.LayerNorm",
)
_DISTILBERT = Row(
    (
        Layers(
            "transformer.layer",
            {
                ATTENTION: Place("attention", "attention", "sa_layer_norm"),
                OUTPUT: Place("ffn", "ffn", "output_layer_norm"),
            },
        ),
    ),
    "embeddings",
    "embeddings.LayerNorm",
)
_GPT2 = Row(
    (Layers("h", {ATTENTION: Place("attn", "ln_1"), OUTPUT: Place("mlp", "ln_2")}),),
    "drop",
    "wte",
)
_LLAMA = Row(
    (
        Layers(
            "layers",
            {
                ATTENTION: Place("self_attn", "input_layernorm"),
                OUTPUT: Place("mlp", "post_attention_layernorm"),
            },
        ),
    ),
    "embed_tokens",
    "embed_tokens",
)
_T5 = Row(
    (
        Layers(
            "encoder.block",
            {
                ATTENTION: Place("layer.0.dropout", "layer.0.layer_norm"),
                OUTPUT: Place("layer.1.dropout", "layer.1.layer_norm"),
            },
        ),
        Layers(
            "decoder.block",
            {
                ATTENTION: Place("layer.0.dropout", "layer.0.layer_norm"),
                CROSS: Place("layer.1.dropout", "layer.1.layer_norm"),
                OUTPUT: Place("layer.2.dropout", "layer.2.layer_norm"),
            },
        ),
    ),
    "encoder.embed_tokens",
    "encoder.embed_tokens",
)
_BART_ATTENTION = Place("self_attn", "self_attn", "self_attn_layer_norm")
_BART_OUTPUT = Place("fc2", "fc1", "final_layer_norm")
_BART = Row(
    (
        Layers("encoder.layers", {ATTENTION: _BART_ATTENTION, OUTPUT: _BART_OUTPUT}),
        Layers(
            "decoder.layers",
            {
                ATTENTION: _BART_ATTENTION,
                CROSS: Place("encoder_attn", "encoder_attn", "encoder_attn_layer_norm"),
                OUTPUT: _BART_OUTPUT,
            },
        ),
    ),
    "encoder.layernorm_embedding",
    "encoder.layernorm_embedding",
)

PLACES: dict[str, Row] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "deberta-v2": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "gemma": _LLAMA,
    "phi3": _LLAMA,
    "t5": _T5,
    "mt5": _T5,
    "bart": _BART,
}


def has_places(base: Base) -> bool:
    """Whether its family has a row."""
    return base.model_type in PLACES


def places(base: Base) -> dict[str, Found]:
    """The places of every layer by what an adapter calls them; {} for a family without a row."""
    row = PLACES.get(base.model_type)
    if row is None:
        return {}
    found: dict[str, Found] = {}
    first = 0
    for stack in row.stacks:
        made = list(_of_stack(stack, base.modules, first))
        found |= {one.path: one for one in made}
        first = max((one.number + 1 for one in made), default=first)
    return found | {one.path: one for one in _embeddings(row, base.modules)}


def _of_stack(stack: Layers, modules: Mapping[str, Module], first: int) -> Iterator[Found]:
    pattern = re.compile(rf"((?:.*\.)?{re.escape(stack.path)}\.)([0-9]{{1,6}})\.(.+)")
    ends = {place.sized: None for place in stack.places.values()}
    layers: dict[tuple[int, str], None] = {}
    for name in modules:
        match = pattern.fullmatch(name)
        if match and (match[3] in ends or match[3].startswith(tuple(f"{e}." for e in ends))):
            layers[int(match[2]), f"{match[1]}{match[2]}"] = None
    for number, layer in sorted(layers):
        for kind, place in stack.places.items():
            width = _width(place, layer, modules)
            if width is not None:
                absolute = Place(
                    f"{layer}.{place.h}",
                    f"{layer}.{place.x0}",
                    f"{layer}.{place.norm}" if place.norm else "",
                )
                yield Found(layer, kind, first + number, width, absolute)


def _width(place: Place, layer: str, modules: Mapping[str, Module]) -> int | None:
    """Of h; None where this layer has no such place (cross attention that is not there)."""
    module = modules.get(f"{layer}.{place.sized}")
    return None if module is None else module.n_out


def _embeddings(row: Row, modules: Mapping[str, Module]) -> Iterator[Found]:
    for name, module in modules.items():
        if row.embeddings and (name == row.width or name.endswith(f".{row.width}")):
            path = f"{name.removesuffix(row.width)}{row.embeddings}"
            layer = path.rpartition(".")[0]
            yield Found(layer, EMBEDDINGS, -1, module.n_out, Place(path))
            return
