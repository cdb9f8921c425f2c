"""The modules that AdapterHub's LoRA family means, by model family.  adapters 1.3
`models/*/mixin_*.py`."""

from __future__ import annotations

from dataclasses import dataclass

from adapterkit.hub.formats.adapterhub_type import Outer, Paths
from adapterkit.hub.formats.config import ConfigReader
from adapterkit.hub.matching import Targets

MATRICES = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Layer:
    """Patterns of names inside a layer. name: of the list of layers. attention: by matrix, each
    the same one where they are fused."""

    name: str
    attention: dict[str, str]
    intermediate: str
    output: str


def _by_matrix(pattern: str, *names: str) -> dict[str, str]:
    return {m: pattern.format(name) for m, name in zip("qkv", names, strict=True)}


_BERT = Layer(
    "layer",
    _by_matrix(r"(?:cross)?attention\.self\.{}", "query", "key", "value"),
    r"intermediate\.dense",
    r"output\.dense",
)
# Its `intermediate` is the projection down and its `output` the one up.
_LLAMA = Layer(
    "layers",
    _by_matrix(r"self_attn\.{}_proj", *"qkv"),
    r"mlp\.down_proj",
    r"mlp\.up_proj",
)
_BART = Layer(
    "layers",
    _by_matrix(r"(?:self_attn|encoder_attn)\.{}_proj", *"qkv"),
    "fc1",
    "fc2",
)
_T5 = Layer(
    "block",
    _by_matrix(r"layer\.\d\.(?:Self|EncDec)Attention\.{}", *"qkv"),
    r"layer\.\d\.DenseReluDense\.wi(?:_1)?",
    r"layer\.\d\.DenseReluDense\.wo",
)
LAYERS = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "bert-generation": _BERT,
    "distilbert": Layer(
        "layer",
        _by_matrix(r"attention\.{}_lin", *"qkv"),
        r"ffn\.lin1",
        r"ffn\.lin2",
    ),
    "gpt2": Layer(
        "h",
        _by_matrix(r"attn\.c_attn{}", "", "", ""),
        r"mlp\.c_fc",
        r"mlp\.c_proj",
    ),
    "gptj": Layer("h", _by_matrix(r"attn\.{}_proj", *"qkv"), r"mlp\.fc_in", r"mlp\.fc_out"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "bart": _BART,
    "mbart": _BART,
    "plbart": _BART,
    "t5": _T5,
    "mt5": _T5,
}
# The one module that holds q, k and v, a third of its outputs each.
FUSED = {"gpt2": "c_attn"}


def matrices(reader: ConfigReader) -> tuple[str, ...]:
    """Of the attention, those that are adapted."""
    if reader.config.get("attn_matrices") is None:
        return ("q", "v")
    found = reader.names("attn_matrices")
    if not set(found) <= set(MATRICES):
        reader.fault("attn_matrices", f"a list of {', '.join(MATRICES)}")
    return found


def targets(reader: ConfigReader, outer: Outer, paths: Paths) -> Targets:
    """By the rules of the family; of one without a row, the modules that the file has."""
    flags = {
        "selfattn_lora": reader.config.get("selfattn_lora") is None or reader.flag("selfattn_lora"),
        "intermediate_lora": reader.flag("intermediate_lora"),
        "output_lora": reader.flag("output_lora"),
    }
    chosen, left_out = matrices(reader), reader.integers("leave_out")
    layer = LAYERS.get(outer.model_type)
    if layer is None:
        return Targets(tuple(paths))
    attention = [layer.attention[m] for m in chosen if m in layer.attention]
    names = attention if flags["selfattn_lora"] else []
    names += [layer.intermediate] if flags["intermediate_lora"] else []
    names += [layer.output] if flags["output_lora"] else []
    pattern = rf"(?:.*\.)?{layer.name}\.\d+\.(?:{'|'.join(dict.fromkeys(names))})"
    return Targets(pattern if names else (), left_out=left_out or ())
